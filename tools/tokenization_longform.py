"""A SentencePiece model as a tokenizer for transformers. This file travels with exported models whose tokenizer transformers
has no exact equivalent of; training does not use it.
"""

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

MODEL_FILE = "sentencepiece.model"
"""Not tokenizer.model, from which transformers, when it is not told to trust this file, would make something else."""


class LongformTokenizer(PreTrainedTokenizer):
    """Encodes and decodes as the model file does; its methods are those that transformers asks for."""

    vocab_files_names = {"vocab_file": MODEL_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, vocab_file: str, add_bos_token: bool = True, add_eos_token: bool = False, **settings: Any
    ) -> None:
        self.vocab_file = vocab_file
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self.model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        super().__init__(add_bos_token=add_bos_token, add_eos_token=add_eos_token, **settings)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.model.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self.model.id_to_piece(i) for i in self.model.encode(text)]  # never a text's own spelling of an entry

    def _convert_token_to_id(self, token: str) -> int:
        return self.model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.model.id_to_piece(index) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._join([self._convert_token_to_id_with_added_voc(token) for token in tokens])

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        special = set(self.all_special_ids) if skip_special_tokens else set()
        text = self._join([i for i in ids if i not in special])
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def _join(self, ids: list[int]) -> str:
        """Added tokens as they are spelled, what is between them as the model decodes it."""
        parts: list[str] = []
        run: list[int] = []
        for i in ids:
            if i in self._added_tokens_decoder:
                parts += [self.model.decode(run), self._added_tokens_decoder[i].content]
                run = []
            elif i < self.vocab_size:
                run.append(i)
        return "".join([*parts, self.model.decode(run)])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        begin = [self.bos_token_id] if self.add_bos_token and self.bos_token_id is not None else []
        end = [self.eos_token_id] if self.add_eos_token and self.eos_token_id is not None else []
        return begin + token_ids_0 + end + ([] if token_ids_1 is None else begin + token_ids_1 + end)

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        special = set(self.all_special_ids)
        return [int(i in special) for i in token_ids_0]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory) / (f"{filename_prefix}-{MODEL_FILE}" if filename_prefix else MODEL_FILE)
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
