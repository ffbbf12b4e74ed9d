"""The W&B dashboard as code: `python -m tools.dashboard --entity E --project P` saves it as a view of the project.

Every key that a run logs (training/wandb_run.py) is in exactly one section. `--print` shows the view as JSON and needs
neither a key nor a network.
"""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from console.command import CommandParser, DefaultsInHelp
from tools.shown import LAYER_FIGURES, OF_GROUPS, OF_SOURCES, SERIES
from training.wandb_run import STEP_KEY, WANDB_KEYS

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def _of_section(name: str) -> list[tuple[str, str, dict[str, Any]]]:
    of_section = [each for each in SERIES if each.section == name]
    return [(each.title, each.key, {"log_y": True} if each.is_log else {}) for each in of_section]


# section -> (title, what is plotted, further options of the plot); a pattern in /slashes/ takes all keys that match
SECTIONS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "Loss": [
        ("Training loss", "loss", {"smoothing_type": "exponentialTimeWeighted", "smoothing_factor": 0.6}),
        ("Validation loss", "/^validation/.+/loss$/", {}),
        (OF_SOURCES, "/^validation/.+/loss_by_source/.+/", {}),
        ("Validation bits per byte", "/^validation/.+/bits_per_byte$/", {}),
        ("Loss by adapter", "/^adapters/.+/loss$/", {}),
        ("Share of the targets that each adapter made", "/^adapters/.+/share$/", {}),
        ("Share of a source's targets that each adapter made", "/^adapters/.+/share_of/.+/", {}),
        ("Objective", "objective", {"smoothing_type": "exponentialTimeWeighted", "smoothing_factor": 0.6}),
    ],
    "Optimisation": [
        *_of_section("Optimisation"),
        (OF_GROUPS, "/^groups/grad_norm/.+/", {"log_y": True}),
        ("Skipped steps", "skipped_steps", {}),
    ],
    "Speed": [
        *_of_section("Speed"),
        ("Seconds per step", "step_seconds", {}),
        ("Foreseen by the plan, and measured", "/^plan/.+/", {}),
        ("Attention of the busiest rank beyond the average", "attention_imbalance", {}),
    ],
    "Goodput": [
        ("Share of the wall time that was productive", "/^goodput/share$/", {}),
        ("Where the wall time went (seconds)", "/^goodput/.+_seconds$/", {}),
    ],
    "Layers": [
        (f"{title} by layer", f"/^layers/{kind}/.+/", {"log_y": log}) for kind, (title, log) in LAYER_FIGURES.items()
    ],
    "Progress": [
        ("Tokens", "tokens", {}),
        ("Samples", "samples", {}),
        ("Seconds to go", "eta_seconds", {}),
        ("Events", "/^events/.+$/", {}),
    ],
}


def workspace(entity: str, project: str, name: str) -> "Workspace":
    """The view, not yet saved: curves over optimizer steps, and last the runs' configurations side by side."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def plot(title: str, what: str, options: dict[str, Any]) -> reports.LinePlot:
        shown = {"metric_regex": what.strip("/")} if what.startswith("/") else {"y": [WANDB_KEYS[what]]}
        return reports.LinePlot(title=title, x=STEP_KEY, **shown, **options)

    sections = [
        workspaces.Section(name=section, panels=[plot(*panel) for panel in panels], is_open=True)
        for section, panels in SECTIONS.items()
    ]
    sections.append(workspaces.Section(name="Configurations", panels=[reports.RunComparer(diff_only="split")]))
    columns = ["run:displayName", f"summary:{WANDB_KEYS['loss']}", f"summary:{WANDB_KEYS['tokens_per_second']}"]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        runset_settings=workspaces.RunsetSettings(pinned_columns=columns),
    )


def specification(view: "Workspace") -> dict[str, Any]:
    """The view as the JSON object that W&B stores."""
    return view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog="python -m tools.dashboard",
        description=__doc__.partition("\n")[0],
        formatter_class=DefaultsInHelp,
    )
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", default="longform", help="W&B project of the runs")
    parser.add_argument("--name", default="Longform", help="name of the saved view")
    parser.add_argument("--print", action="store_true", help="show the view as JSON instead of saving it")
    options = parser.parse_args(arguments)
    view = workspace(options.entity, options.project, options.name)
    if options.print:
        print(json.dumps(specification(view), indent=2))
        return 0
    import wandb

    if not wandb.login(prompt=False, verify=False):
        print("tools.dashboard: no W&B key: run `wandb login`, or use --print", file=sys.stderr)
        return 2
    try:
        view.save()
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever W&B's client raises for a wrong key, project or network
        print(f"tools.dashboard: W&B did not save the view: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(view.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
