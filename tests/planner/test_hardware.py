"""What `--hardware` names, and the sentences about what it does not."""

import psutil
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from planner.hardware import LIST, NODE, find_hardware


@given(st.sampled_from(sorted(LIST)), st.integers(1, 4096))
def test_a_device_of_the_list_comes_in_nodes(name, number):
    if number > NODE and number % NODE:
        with pytest.raises(ValueError, match=f"--hardware {name}x{number}: devices {number} are not whole nodes of 8"):
            find_hardware(f"{name}x{number}")
        return
    found = find_hardware(f"{name.upper()}x{number}")
    assert (found.device.name, found.devices, found.source) == (name, number, LIST[name].source)
    last = found.topology(number - 1)
    assert (last.world_size, last.local_size, last.device.type) == (number, min(number, NODE), "cuda")
    assert last.local_rank == (number - 1) % NODE


def test_the_list_is_of_real_devices():
    """Each has between a GiB and a TiB, computes more than it reads, and reaches its neighbours faster than other nodes."""
    for name in LIST:
        one = find_hardware(name)
        assert one.devices == 1
        assert 2**30 < one.device.memory < 2**40
        assert one.device.bf16_flops > 50 * one.device.memory_bandwidth > 50 * one.inside_bandwidth
        assert one.inside_bandwidth > one.between_bandwidth
        assert one.price is None


def test_a_file_has_the_same_fields(tmp_path):
    file, listed = tmp_path / "hosts.yaml", find_hardware("h200x16")
    file.write_text(yaml.safe_dump(listed.model_dump() | {"price": 2.5}))
    assert find_hardware(str(file)) == listed.model_copy(update={"price": 2.5})


def test_this_machine_has_what_it_has():
    found = find_hardware("this")
    if torch.cuda.is_available():
        assert found.devices == torch.cuda.device_count()
        assert found.device.memory == torch.cuda.get_device_properties(0).total_memory
        return
    assert (found.device.kind, found.devices) == ("cpu", 1)
    assert 2**30 < found.host_memory <= psutil.virtual_memory().total
    four = find_hardware("thisx4")
    assert four.topology().local_size == four.devices == 4
    assert four.device.memory * 4 <= four.host_memory


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("h10x8", "no such device; did you mean 'h100'?"),
        ("h100x0", "no such device"),
        ("nowhere.yaml", "nowhere.yaml: no such hardware file"),
    ],
)
def test_what_is_named_wrongly(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_hardware(text)


def test_a_file_that_is_wrong_is_named_with_the_place(tmp_path):
    file, good = tmp_path / "hosts.yaml", find_hardware("h100x12000").model_dump()
    for change, sentence in [
        ({"pricee": 1}, "pricee: unknown key; did you mean 'price'?"),
        ({"device": good["device"] | {"memory": -1}}, "device.memory: .*greater than 0"),
        ({"devices_per_node": 7}, "devices 12000 are not whole nodes of 7"),
    ]:
        file.write_text(yaml.safe_dump(good | change))
        with pytest.raises(ValueError, match=f"{file}: {sentence}") as caught:
            find_hardware(str(file))
        assert len(str(caught.value).splitlines()) == 1
    file.write_text("- h100")
    with pytest.raises(ValueError, match="a hardware file is a mapping"):
        find_hardware(str(file))
