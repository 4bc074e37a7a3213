"""Taking pieces out of a tokenizer: which ones a corpus uses, and a tokenizer of those alone that cuts it as before.

Ids keep their order: the new id of a piece is its place among the kept ones. Why the corpus is cut as before:

- WordPiece takes the longest piece that fits. Of the pieces that it took, a longer one never fitted. A word for which
  it found no piece at the end is unknown as before where the pieces that it had taken until then are kept, too.
- Unigram takes the pieces of the highest sum of scores (Kudo 2018, arXiv 1804.10959, section 3.1). The sums of other
  cuts do not change. A piece of one character that is gone lets an unknown token stand in its place, whose score is
  the lowest of all less 10: below the cut that the piece was in, as long as a piece of that lowest score is kept.
- BPE joins the first pair in the order of its merges. Merges that were never used can go; each kept piece keeps all
  that lead to it, and with them the pieces that they join.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kdcli.errors import InputError, RunError
from kdcli.models.quiet import quiet_transformers
from kdcli.words import counted

CHUNK = 2_000
"""How many texts are cut at once."""


@dataclass(frozen=True)
class Corpus:
    """Texts, and the ids that a tokenizer cuts each into, without special tokens: those of text i end at `ends[i]`."""

    texts: Sequence[str]
    ids: np.ndarray
    ends: np.ndarray

    def of(self, start: int, stop: int) -> list[list[int]]:
        """Return the ids of texts `start` to `stop`."""
        first = int(self.ends[start - 1]) if start else 0
        parts = np.split(self.ids[first : self.ends[stop - 1]], self.ends[start : stop - 1] - first)
        return [part.tolist() for part in parts]


@dataclass(frozen=True)
class Changes:
    """How texts are cut by a trimmed tokenizer that may hold other pieces than those it was trimmed to.

    changed_words: cut otherwise; unknown_words: those among them with an unknown token that was none before. Words are
    the tokenizer's own, what it never joins; where it has none a text is one.
    """

    texts: int
    changed_texts: int
    words: int
    changed_words: int
    unknown_words: int

    @property
    def in_words(self) -> str:
        """What changes, in a few words."""
        words, texts = max(1, self.words), max(1, self.texts)
        return (
            f"{self.changed_words / words:.2%} of {counted(self.words, 'word')} are cut otherwise, in "
            f"{self.changed_texts / texts:.1%} of {counted(self.texts, 'text')}; {self.unknown_words / words:.2%} are "
            "unknown now"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the counts, and the shares of words."""
        return {
            **asdict(self),
            "changed_share": self.changed_words / max(1, self.words),
            "unknown_share": self.unknown_words / max(1, self.words),
        }


class Pieces:
    """The pieces of a tokenizer of the library `tokenizers`, and what each needs beside itself."""

    def __init__(self, tokenizer: Any) -> None:
        """Raise InputError for a tokenizer that is no such one."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(
                f"{type(tokenizer).__name__} is a tokenizer of Python code alone, without a tokenizer.json",
                hint="convert it to a fast tokenizer of the transformers library first",
            )
        self.tokenizer = tokenizer
        self.document: dict[str, Any] = json.loads(backend.to_str())
        self.model: dict[str, Any] = self.document["model"]
        self.kind: str = self.model["type"]
        if self.kind not in ("WordPiece", "Unigram", "BPE", "WordLevel"):
            raise InputError(f"a tokenizer of the type {self.kind} cannot be trimmed")
        vocabulary = self.model["vocab"]
        words = [piece for piece, _ in vocabulary] if self.kind == "Unigram" else vocabulary
        self.ids: dict[str, int] = (
            {piece: number for number, piece in enumerate(words)} if self.kind == "Unigram" else dict(words)
        )
        self.added: dict[int, dict[str, Any]] = {entry["id"]: entry for entry in self.document["added_tokens"]}
        self.of_id: dict[int, str] = {number: piece for piece, number in self.ids.items()}
        self.of_id.update({number: entry["content"] for number, entry in self.added.items()})

    @property
    def rows(self) -> int:
        """How many rows of embeddings its ids need."""
        return max(self.of_id) + 1

    @cached_property
    def always(self) -> frozenset[int]:
        """The ids that no choice leaves out: special and added tokens, the unknown one, and a piece for every byte."""
        found = {*self.added, *self.tokenizer.all_special_ids, *_ids_of(self.document["post_processor"])}
        found |= {number for number in (self.unknown,) if number is not None}
        names: list[str] = []
        if self.model.get("byte_fallback"):
            names += [f"<0x{byte:02X}>" for byte in range(256)]
        if self._has_spaces:
            from tokenizers.pre_tokenizers import ByteLevel

            names += ByteLevel.alphabet()
        found |= {self.ids[name] for name in names if name in self.ids}
        if self.kind == "Unigram":
            scores = [score for _, score in self.model["vocab"]]
            lowest = min(scores)
            if all(scores[number] > lowest for number in found if number < len(scores)):
                found.add(scores.index(lowest))
        return frozenset(found)

    @cached_property
    def _has_spaces(self) -> bool:
        """True where pieces are of bytes, spaces among them."""
        return "ByteLevel" in json.dumps([self.document["normalizer"], self.document["pre_tokenizer"]])

    @property
    def unknown(self) -> int | None:
        """The id of what it has no piece for, whether or not its configuration names it."""
        if self.kind == "Unigram":
            return self.model["unk_id"]
        return self.ids.get(self.model.get("unk_token") or "")

    @cached_property
    def _parts(self) -> dict[int, set[int]]:
        """The pieces that merges make each piece of BPE from."""
        found: dict[int, set[int]] = {}
        for first, second in self._merges:
            pair = {self.ids[first], self.ids[second]}
            found.setdefault(self.ids[self._joined(first, second)], set()).update(pair)
        return found

    @cached_property
    def _merges(self) -> list[tuple[str, str]]:
        return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in self.model.get("merges", ())]

    def _joined(self, first: str, second: str) -> str:
        return first + second.removeprefix(self.model.get("continuing_subword_prefix") or "")

    def with_ancestors(self, number: int) -> set[int]:
        """Return a piece's id with those of all pieces that merges join to it."""
        if self.kind != "BPE":
            return {number}
        found, open_ = {number}, [number]
        while open_:
            new = self._parts.get(open_.pop(), set()) - found
            found |= new
            open_ += new
        return found

    def read(self, texts: Sequence[str]) -> Corpus:
        """Cut texts."""
        parts, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for _, encodings in encoded(self.tokenizer, texts):
            rows = [encoding.ids for encoding in encodings]
            parts.append(np.fromiter((number for row in rows for number in row), np.int32))
            lengths.append(np.array([len(row) for row in rows], np.int64))
        return Corpus(texts, np.concatenate(parts), np.cumsum(np.concatenate(lengths)))

    def counts(self, corpus: Corpus) -> np.ndarray:
        """Return how often a corpus uses each id, (rows,).

        WordPiece also uses those that it took in unknown words; bytes with spaces those of a text's first word
        behind a space, as the word is read where words come one by one.
        """
        counts = np.bincount(corpus.ids, minlength=self.rows)
        if self._has_spaces:
            words = {f" {text.split(maxsplit=1)[0]}" for text in corpus.texts if text.strip()}
            for _, encodings in encoded(self.tokenizer, sorted(words)):
                for encoding in encodings:
                    counts[encoding.ids] += 1
        unknown = self.unknown
        if self.kind == "WordPiece" and unknown is not None and counts[unknown]:
            starts = np.concatenate([[0], corpus.ends[:-1]])
            places = np.unique(np.searchsorted(corpus.ends, np.flatnonzero(corpus.ids == unknown), side="right"))
            assert len(starts) == len(corpus.texts)
            for place in places:
                for number in self._taken(corpus.texts[place]):
                    counts[number] += 1
        return counts

    def _taken(self, text: str) -> Iterable[int]:
        """Yield the ids of the pieces that WordPiece takes in the words of a text that end up unknown."""
        backend = self.tokenizer.backend_tokenizer
        prefix, longest = self.model["continuing_subword_prefix"], self.model["max_input_chars_per_word"]
        text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        words = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer is not None else [(text, None)]
        for word, _ in words:
            if len(word) > longest or self.unknown not in {token.id for token in backend.model.tokenize(word)}:
                continue
            start = 0
            while start < len(word):
                pieces = (("" if start == 0 else prefix) + word[start:end] for end in range(len(word), start, -1))
                piece = next((piece for piece in pieces if piece in self.ids), None)
                if piece is None:
                    break
                yield self.ids[piece]
                start += len(piece) - (0 if start == 0 else len(prefix))

    def choose(
        self,
        counts: np.ndarray,
        *,
        keep: int | None = None,
        min_count: int = 1,
        characters: bool = True,
        needed: Iterable[int] = (),
        place: Callable[[str], str] = str,
    ) -> np.ndarray:
        """Return the ids of the pieces that stay, in rising order.

        counts: as `counts` gives them. keep: the most pieces, those used most. min_count: how often each must be used.
        characters: keep a piece for every character of the used ones, as a beginning and as a continuation, so that no
        new word of these characters is unknown. needed: ids that stay in any case, beside `always`. place: what
        messages call `text` and `keep`.
        Raises InputError where nothing of the corpus stays, and where `keep` is less than what stays in any case.
        """
        stays = {*self.always, *needed} & set(self.of_id)
        used = [int(n) for n in np.lexsort((np.arange(len(counts)), -counts)) if counts[n] >= min_count]
        used = [number for number in used if number in self.of_id]
        if not any(number in self.of_id and number not in self.added and number != self.unknown for number in used):
            often = "" if min_count == 1 else f" {min_count:,} times or more"
            raise InputError(
                f"the text uses no piece of the tokenizer{often}: nothing of it would be kept",
                where=place("text"),
                hint="give text that the model is to read" if min_count == 1 else f"use a smaller {place('min_count')}",
            )
        if characters:
            letters = {letter for number in used for letter in self.of_id[number] if number not in self.added}
            prefix = self.model.get("continuing_subword_prefix") or ""
            names = {name for letter in letters for name in (letter, prefix + letter)}
            stays |= {self.ids[name] for name in names if name in self.ids}
        for number in list(stays):
            stays |= self.with_ancestors(number)
        if keep is not None and keep < len(stays):
            raise InputError(
                f"{keep:,} pieces are fewer than the {len(stays):,} that are kept in any case: special and added "
                f"tokens, prompts{', single characters' if characters else ''} and bytes",
                where=place("keep"),
                hint=f"use at least {len(stays) + 1:,}" + (", or keep no characters" if characters else ""),
            )
        for number in used:
            wanted = self.with_ancestors(number) - stays
            if keep is None or len(stays) + len(wanted) <= keep:
                stays |= wanted
        return np.array(sorted(stays), np.int64)

    def cut(self, kept: np.ndarray) -> Any:
        """Return a tokenizer of the pieces with these ids alone.

        Raises RunError when the library reads another one from its files.
        """
        number = {int(old): new for new, old in enumerate(kept)}
        document = dict(self.document)
        document["model"] = self._cut_model(number)
        document["added_tokens"] = [{**entry, "id": number[entry["id"]]} for entry in self.document["added_tokens"]]
        document["post_processor"] = _renumbered(self.document["post_processor"], number)
        # What an earlier call cut or padded to is no part of a tokenizer.
        document["padding"] = document["truncation"] = None
        from tokenizers import Tokenizer

        made = copy.copy(self.tokenizer)
        made.init_kwargs = dict(self.tokenizer.init_kwargs)
        made._tokenizer = Tokenizer.from_str(json.dumps(document))
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            made.save_pretrained(folder)
            again = type(self.tokenizer).from_pretrained(folder)
        expected = {self.of_id[old]: new for old, new in number.items()}
        found = made.get_vocab().items() | again.get_vocab().items()
        if differing := sorted(expected.items() ^ found, key=lambda pair: (pair[1], pair[0])):
            raise RunError(
                f"the trimmed tokenizer has other ids than it should: {differing[0][0]!r} and "
                f"{counted(len(differing) - 1, 'more piece')}"
            )
        # Some classes build it again, with numbers of their own for what is unknown.
        models = [json.loads(one.backend_tokenizer.to_str())["model"] for one in (made, again)]
        if models[0] != models[1]:
            raise RunError(f"{type(made).__name__} reads another tokenizer from the files of the trimmed one")
        return made

    def _cut_model(self, number: dict[int, int]) -> dict[str, Any]:
        model = dict(self.model)
        if self.kind == "Unigram":
            model["vocab"] = [entry for old, entry in enumerate(self.model["vocab"]) if old in number]
            if self.unknown is not None:
                model["unk_id"] = number[self.unknown]
            return model
        model["vocab"] = {piece: number[old] for piece, old in self.ids.items() if old in number}
        if self.kind == "BPE":
            model["merges"] = [
                pair
                for pair in self._merges
                if all(self.ids[piece] in number for piece in (*pair, self._joined(*pair)))
            ]
        return model


def encoded(tokenizer: Any, texts: Sequence[str]) -> Iterable[tuple[int, list[Any]]]:
    """Yield the place of the first of some texts, and the library's encodings of them without special tokens."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    for start in range(0, len(texts), CHUNK):
        yield start, backend.encode_batch(list(texts[start : start + CHUNK]), add_special_tokens=False)


def check_cut(corpus: Corpus, tokenizer: Any, kept: np.ndarray, *, unknown: int | None = None) -> np.ndarray:
    """Return which texts are cut otherwise, (texts,), and raise RunError where one is whose pieces are all kept.

    tokenizer: the trimmed one. unknown: the id of the unknown piece where pieces that the corpus uses were left out,
    among them perhaps some of words that are unknown in spite of them: a text with it is no error.
    """
    known = np.isin(np.arange(int(max(kept.max(), corpus.ids.max(initial=0))) + 1), kept)
    changed = np.zeros(len(corpus.texts), bool)
    old = kept.tolist()
    for start, encodings in encoded(tokenizer, corpus.texts):
        rows = corpus.of(start, start + len(encodings))
        for place, (row, encoding) in enumerate(zip(rows, encodings, strict=True), start):
            found = [old[number] for number in encoding.ids]
            if found == row:
                continue
            if known[row].all() and unknown not in row:
                raise RunError(
                    f"text {place + 1} is cut otherwise by the trimmed tokenizer: {cut_words(corpus.texts[place])}"
                )
            changed[place] = True
    return changed


def cut_words(text: str, most: int = 60) -> str:
    """Return the beginning of a text on one line, for a message."""
    line = " ".join(text.split())
    return repr(line if len(line) <= most else line[: most - 3] + "...")


def changes_of(texts: Sequence[str], pieces: Pieces, after: Any, kept: np.ndarray) -> Changes:
    """Return how much of texts a trimmed tokenizer cuts otherwise than the one with these pieces."""
    old = kept.tolist()
    words = changed_words = unknown_words = changed_texts = 0
    for (_, ours), (_, theirs) in zip(encoded(pieces.tokenizer, texts), encoded(after, texts), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            words += len(set(one.word_ids) - {None})
            found = [old[number] for number in other.ids]
            if found == one.ids:
                continue
            changed_texts += 1
            then, now = _by_word(one.word_ids, one.ids), _by_word(other.word_ids, found)
            for word in then.keys() | now.keys():
                if then.get(word) != now.get(word):
                    changed_words += 1
                    unknown_words += pieces.unknown in now.get(word, [])
    return Changes(len(texts), changed_texts, words, changed_words, unknown_words)


def same_parts(texts: Sequence[str], pieces: Pieces, after: Any, kept: np.ndarray, most: int) -> list[str]:
    """Return parts of texts, at most one of each and `most` in all, that a trimmed tokenizer cuts as before.

    A part is a run of words, the longest one that is cut so where it stands alone, too, and is not all unknown.
    """
    found: list[str] = []
    for (start, ours), (_, theirs) in zip(encoded(pieces.tokenizer, texts), encoded(after, texts), strict=True):
        for text, one, other in zip(texts[start : start + CHUNK], ours, theirs, strict=True):
            if len(found) == most:
                return found
            runs = sorted(_same_runs(text, one, other, kept), key=len, reverse=True)
            found += next(([run] for run in runs if _is_same(run, pieces, after, kept)), [])
    return found


def _same_runs(text: str, one: Any, other: Any, kept: np.ndarray) -> list[str]:
    """Return the longest runs of words of a text that two encodings cut alike, with a space before them."""
    then, now = _by_word(one.word_ids, one.ids), _by_word(other.word_ids, kept[other.ids].tolist())
    spans: list[list[int]] = []
    joined = None
    for word, (start, end) in zip(one.word_ids, one.offsets, strict=True):
        if word is None or then[word] != now.get(word):
            joined = None
        elif joined is None:
            joined = [start, end]
            spans.append(joined)
        else:
            joined[1] = end
    return [text[start - (text[max(0, start - 1) : start].isspace()) : end] for start, end in spans]


def _is_same(text: str, pieces: Pieces, after: Any, kept: np.ndarray) -> bool:
    """Return whether a text that is not all unknown is cut as before."""
    ids = [next(iter(encoded(each, [text])))[1][0].ids for each in (pieces.tokenizer, after)]
    return bool(set(ids[0]) - {pieces.unknown}) and kept[ids[1]].tolist() == ids[0]


def _by_word(words: Sequence[int | None], ids: Sequence[int]) -> dict[int | None, list[int]]:
    found: dict[int | None, list[int]] = {}
    for word, number in zip(words, ids, strict=True):
        found.setdefault(word, []).append(number)
    return found


def _ids_of(processor: dict[str, Any] | None) -> Iterable[int]:
    """Yield the ids that a post-processor adds to texts."""
    if processor is None:
        return
    for entry in processor.get("processors", ()):
        yield from _ids_of(entry)
    # A template's is a table of tokens; those of other types are lists.
    special = processor.get("special_tokens")
    if isinstance(special, dict):
        for entry in special.values():
            yield from entry["ids"]
    for name in ("cls", "sep"):
        if isinstance(processor.get(name), list):
            yield processor[name][1]


def _renumbered(processor: dict[str, Any] | None, number: dict[int, int]) -> dict[str, Any] | None:
    """Return a post-processor with new ids."""
    if processor is None:
        return None
    made = dict(processor)
    if "processors" in made:
        made["processors"] = [_renumbered(entry, number) for entry in made["processors"]]
    if isinstance(made.get("special_tokens"), dict):
        made["special_tokens"] = {
            name: {**entry, "ids": [number[old] for old in entry["ids"]]}
            for name, entry in made["special_tokens"].items()
        }
    for name in ("cls", "sep"):
        if isinstance(made.get(name), list):
            made[name] = [made[name][0], number[made[name][1]]]
    return made
