"""Conversations, and templates of the usual kinds, each as it is found and with marks around what the assistant writes."""

from hypothesis import strategies as st

from tests.data_prep.texts import PROSE

CHATML = """{%- for m in messages %}
{{- '<|im_start|>' + m['role'] + '\n' }}
{%- if m['role'] == 'assistant' %}[[{{- m['content'] + '<|im_end|>' + '\n' }}]]
{%- else %}{{- m['content'] + '<|im_end|>' + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
INST = """{{- bos_token }}
{%- for m in messages %}
{%- if m['role'] == 'assistant' %}[[{{- ' ' + m['content'] + eos_token }}]]
{%- elif m['role'] == 'system' %}{{- '<<SYS>>' + m['content'] }}
{%- else %}{{- '[INST] ' + m['content'] + ' [/INST]' }}
{%- endif %}
{%- endfor %}"""
PLAIN = """{%- for m in messages %}
{{- m['role'] + ': ' }}
{%- if m['role'] == 'assistant' %}[[{{- m['content'] | trim + '\n\n' }}]]
{%- else %}{{- m['content'] | trim + '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "inst": INST, "plain": PLAIN}


def unmarked(template: str) -> str:
    return template.replace("[[", "").replace("]]", "")


def marked(template: str) -> str:
    return template.replace("[[", "{%- generation %}").replace("]]", "{%- endgeneration %}")


def turns(texts: list[str], system: bool = False) -> list[dict[str, str]]:
    """A conversation in which user and assistant take turns."""
    roles = (["system"] if system else []) + ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


words = st.one_of(
    st.sampled_from(["the", " and", "1234", "é", "中文", "👩‍👩‍👧", "x\ny", "  a ", "\n", "<tag>", "don't"]),
    st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn", "Co"], exclude_characters="<▁"), max_size=8),
)
texts = st.lists(words, min_size=1, max_size=6).map("".join).filter(str.strip)
conversations = st.builds(turns, st.lists(texts, min_size=3, max_size=7), st.booleans())


def prose_chats(count: int) -> list[dict]:
    """Records with conversations of one to three turns, of any length up to a few thousand characters."""
    records = []
    for i in range(count):
        said = [PROSE[(7 * i + k) % len(PROSE)][: 20 + (i * 97 + k * 331) % 900] for k in range(2 + 2 * (i % 3))]
        records.append({"id": f"chat-{i}", "messages": turns(said, system=i % 4 == 0 and len(said) > 2)})
        if records[-1]["messages"][-1]["role"] == "user":
            records[-1]["messages"].append({"role": "assistant", "content": PROSE[i % len(PROSE)][:200]})
    return records


CHATS = prose_chats(60)
CHAT_OPTIONS = {"messages_field": "messages", "id_field": "id", "unit_bytes": 1 << 13, "validation_fraction": 0.1}
