"""The sentences around a pass key, by language (see `tools.evaluation.passkey`)."""

from typing import NamedTuple


class Phrases(NamedTuple):
    introduction: str
    needle: str
    question: str
    answer: str


PHRASES = {
    "en": Phrases(
        "Somewhere in this text there is a pass key. Remember it.\n",
        "\nThe pass key is {key}. Remember it: {key} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
        " {key}",
    ),
    "zh": Phrases(
        "下文中藏有一个通行密码，请记住它。\n",
        "\n通行密码是{key}。请记住：{key}就是通行密码。\n",
        "\n请问它是多少？通行密码是",
        "{key}",
    ),
}
