"""Translations chosen from N-best lists, and of monolingual text."""

import itertools
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary, data_utils
from sacrebleu.metrics import CHRF

from sekd_fairseq.distilled_data import read_scores
from sekd_fairseq.errors import UserError
from sekd_fairseq.generated import read_generated, read_nbest, same_text
from sekd_fairseq.llm.text import LanguageModelText
from sekd_fairseq.llm.vocabulary import symbol_of
from sekd_fairseq.splits import link_others, training_side
from sekd_fairseq.translations import joined_chrf, mean_chrf, nearest_to_references, with_an_end

from .conftest import WORDS, binarise, command, error_line, sentence_pairs, write_text


def generated(path: Path, lists: list[list[str]]) -> Path:
    """What fairseq-generate prints of these translations, sentences in another order."""
    lines = []
    for sentence in reversed(range(len(lists))):
        lines.append(f"S-{sentence}\tsource")
        for text in lists[sentence]:
            lines += [f"H-{sentence}\t-0.5\t{text}", f"D-{sentence}\t-0.5\t{text}"]
    path.write_text("".join(f"{line}\n" for line in [*lines, "Generate train"]))
    return path


def whole(path: Path, *sides: list[str]) -> Path:
    """What fairseq-generate prints of sources, references and translations, all of it."""
    with path.open("w") as stream:
        for i, (source, target, text) in enumerate(zip(*sides, strict=True)):
            stream.write(
                f"S-{i}\t{source}\nT-{i}\t{target}\nH-{i}\t-1\t{text}\nD-{i}\t-1\t{text}\n"
            )
            stream.write(f"P-{i}\t{' '.join(['-0.1234'] * 20)}\n")
    return path


def side(data: Path, split: str, language: str) -> list[str]:
    """A split's sentences, as text."""
    dictionary = Dictionary.load(str(data / f"dict.{language}.txt"))
    sentences: Any = data_utils.load_indexed_dataset(
        str(data / f"{split}.en-de.{language}"), dictionary
    )
    return [dictionary.string(sentences[i]) for i in range(len(sentences))]


def distil(*words: object, check: bool = True) -> str:
    return command("sekd_fairseq.distilled_data", *words, check=check)


def test_lists_are_read_in_their_own_order(tmp_path: Path) -> None:
    path = generated(tmp_path / "out", [["a b", "c"], ["d"]])
    found = read_nbest(path, "H-", 2)
    assert found == {0: ["a b", "c"], 1: ["d"]}
    (tmp_path / "scores").write_text("1\n2\n3\n")  # of d, a b, c
    assert read_scores(tmp_path / "scores", found) == {1: [1.0], 0: [2.0, 3.0]}
    for wrong in ("1\n2\n", "1\n2\nx\n", "1\n2\nnan\n"):
        (tmp_path / "scores").write_text(wrong)
        with pytest.raises(UserError, match="--scores"):
            read_scores(tmp_path / "scores", found)


def test_translations_of_other_sentences_are_refused(
    data: Path, llm_data: Path, tmp_path: Path
) -> None:
    sources, targets = side(data, "train", "en"), side(data, "train", "de")
    path, words = tmp_path / "out", (data, "--generated", tmp_path / "out", "--output")

    def refused(*options: object) -> str:
        return error_line(distil(*words, tmp_path / "no", *options, check=False))

    whole(path, sources[::-1], targets[::-1], targets[::-1])
    first = next(i for i, text in enumerate(sources) if not same_text(text, sources[-1 - i]))
    assert f"sentence {first} S-{first} {sources[-1 - first][:60]!r}, where" in refused()
    # Of the other direction, which the data serve too.
    whole(path, targets, sources, [f"{text} one" for text in sources])
    assert "give --source-lang and --target-lang" in refused()
    assert "expect each other" in refused("--source-lang", "de")
    assert "found en and de" in refused("--source-lang", "de", "--target-lang", "fr")
    distil(*words, tmp_path / "reverse", "--source-lang", "de", "--target-lang", "en")
    assert side(tmp_path / "reverse", "train", "en") == [f"{text} one" for text in sources]
    assert side(tmp_path / "reverse", "train", "de") == targets
    # With unknown words, and in text instead of pieces.
    text = [f"{line.replace('one', '<unk>').title()}." for line in sources]
    whole(path, text, targets, targets)
    distil(*words, tmp_path / "text")
    # Several jobs that translated everything each.
    printed = whole(path, sources, targets, targets).read_text()
    path.write_text(printed + printed)
    assert "found sentence 0 twice" in refused()
    # A language model's prompts are not printed whole; the references tell.
    found = side(llm_data, "train", "de")
    text_of = LanguageModelText(llm_data, Dictionary.load(str(llm_data / "dict.de.txt"))).decode
    shifted = [text_of(line) for line in found[1:] + found[:1]]
    whole(path, ["Translate:"] * len(found), shifted, found)
    line = error_line(distil(llm_data, *words[1:], tmp_path / "no", check=False))
    assert " T-" in line and not (tmp_path / "no").exists()
    whole(path, ["Translate:"] * len(found), [text_of(line) for line in found], found)
    distil(llm_data, *words[1:], tmp_path / "llm")


def test_a_large_output_is_not_held_in_memory(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(2000)]
    path = whole(tmp_path / "out", texts, texts, texts)
    tracemalloc.start()
    assert read_generated(path, "H-", len(texts)) == texts
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * len(texts)  # of all lines it would be twice as much


def test_text_of_a_teacher_with_other_pieces_is_cut(tmp_path: Path) -> None:
    pairs = list(dict.fromkeys(sentence_pairs(160, seed=2)))
    for split, part in {"train": pairs[40:], "valid": pairs[:20], "test": pairs[20:40]}.items():
        write_text(tmp_path, split, part)
    prepared = tmp_path / "prepared"
    splits = [word for s in ("train", "valid", "test") for word in (f"--{s}", tmp_path / s)]
    command(
        "sekd_fairseq.prepare_data", *splits, "--source-lang", "en", "--target-lang", "de",
        "--vocab-size", 40, "--output", prepared,
    )  # fmt: skip
    references = (tmp_path / "train.de").read_text().splitlines()
    count = len(side(prepared / "bin", "train", "de"))
    assert count == len(references)  # nothing was left out: text and data are line by line
    lists = [[f"{text} Ω", text] for text in references]  # Ω is no piece
    path = generated(tmp_path / "out", lists)
    model = prepared / "sentencepiece.model"
    words = (prepared / "bin", "--generated", path, "--sentencepiece-model", model)
    distil(*words, "--output", tmp_path / "best")
    written, original = (side(d, "train", "de") for d in (tmp_path / "best", prepared / "bin"))
    assert all(best == f"{gold} \u2581 <unk>" for best, gold in zip(written, original, strict=True))
    distil(*words, "--nbest", 2, "--choose", "reference", "--output", tmp_path / "chosen")
    assert side(tmp_path / "chosen", "train", "de") == original
    line = error_line(
        distil(*words[:-1], tmp_path / "none", "--output", tmp_path / "x", check=False)
    )
    assert "--sentencepiece-model" in line and "expected the sentencepiece.model" in line
    line = error_line(distil(*words[:3], "--output", tmp_path / "x", check=False))
    assert line.endswith("or give --sentencepiece-model")


def test_utilities() -> None:
    texts = ["eins zwei drei", "eins zwei vier", "acht neun"]
    exact = CHRF()
    for one, other in itertools.product(texts, texts):
        expected = exact.sentence_score(one, [other]).score
        for pieces in (
            one,
            "▁ei ns ▁z w ei ▁dr ei" if one == texts[0] else one,
            f"{one[0]}@@ {one[1:]}",
        ):
            assert joined_chrf(pieces, other) == pytest.approx(expected)
    values = mean_chrf(texts)
    for i, one in enumerate(texts):
        others = [joined_chrf(one, other) for j, other in enumerate(texts) if j != i]
        assert values[i] == pytest.approx(sum(others) / 2)
    assert values[2] == min(values) and mean_chrf(["a"]) == [0.0]


def test_one_of_n_is_chosen(data: Path, tmp_path: Path) -> None:
    references = side(data, "train", "de")
    # Two alike, the reference, and the two that share a word: what each way wants differs.
    lists = [[f"{text} neun", text, f"{text} neun acht"] for text in references]
    path = generated(tmp_path / "out", lists)
    words = (data, "--generated", path, "--nbest", 3)
    distil(*words, "--choose", "reference", "--output", tmp_path / "r")
    assert side(tmp_path / "r", "train", "de") == references
    distil(*words, "--choose", "mbr", "--output", tmp_path / "m")
    assert side(tmp_path / "m", "train", "de") == [
        max(texts, key=lambda text, texts=texts: mean_chrf(texts)[texts.index(text)])  # type: ignore[misc]
        for texts in lists
    ]
    (tmp_path / "scores").write_text("0\n0\n1\n" * len(lists))
    distil(
        *words, "--choose", "scores", "--scores", tmp_path / "scores", "--output", tmp_path / "s"
    )
    assert side(tmp_path / "s", "train", "de") == [texts[2] for texts in lists]
    # Back to the source from the second of each list alone; sentences are generated in another order.
    sources = side(data, "train", "en")
    back = [text for source in reversed(sources) for text in ("?", source, "??")]
    interactive = "".join(f"S-{i}\tx\nH-{i}\t-0.1\t{text}\n" for i, text in enumerate(back))
    (tmp_path / "back").write_text(interactive)
    way = ("--choose", "round-trip", "--back")
    distil(*words, *way, tmp_path / "back", "--output", tmp_path / "t")
    assert side(tmp_path / "t", "train", "de") == references
    (tmp_path / "short").write_text(interactive.replace("H-7\t", "H-x\t"))
    line = error_line(
        distil(*words, *way, tmp_path / "short", "--output", tmp_path / "no", check=False)
    )
    assert f"expected {len(back)} translations" in line and "sentence 7 has none" in line
    distil(data, "--generated", path, "--output", tmp_path / "first")
    assert side(tmp_path / "first", "train", "de") == [texts[0] for texts in lists]
    endless = generated(
        tmp_path / "endless", [["eins " * 80], *([text] for text in references[1:])]
    )
    printed = distil(data, "--generated", endless, "--output", tmp_path / "endless-data")
    assert f"1 of {len(references)} translations are longer than twice the reference" in printed
    for options, expected in (
        (["--nbest", 4, "--choose", "mbr"], "has 3 translations"),
        (["--nbest", 2], "--choose"),
        (["--choose", "mbr"], "--nbest"),
        (["--nbest", 2, "--choose", "scores"], "--scores"),
        (["--nbest", 2, "--choose", "round-trip"], "--back"),
        (["--gold-share", 0.5], "--sources"),
        (["--nbest", 0], "1 or more"),
    ):
        line = error_line(
            distil(data, "--generated", path, "--output", tmp_path / "no", *options, check=False)
        )
        assert expected in line


def test_more_text_is_mixed_with_gold(data: Path, tmp_path: Path) -> None:
    held_out = list(zip(side(data, "valid", "en"), side(data, "valid", "de"), strict=True))
    fresh = [pair for pair in sentence_pairs(60, seed=77) if pair not in held_out]
    tested = {*side(data, "test", "en"), *side(data, "valid", "en")}
    clean = [pair for pair in fresh if pair[0] not in tested]
    write_text(tmp_path / "text", "train", fresh + held_out[:5])
    mono = binarise(tmp_path / "text", tmp_path / "mono", data)
    found = side(mono, "train", "en")
    lists = [[" ".join(WORDS[word] for word in reversed(text.split()))] for text in found]
    path = generated(tmp_path / "out", lists)
    words = (data, "--generated", path, "--sources", mono)
    printed = distil(*words, "--output", tmp_path / "all")
    assert f"without {len(found) - len(clean)} that are in a held-out set and 0 that" in printed
    assert side(tmp_path / "all", "train", "en") == [source for source, _ in clean]
    assert side(tmp_path / "all", "train", "de") == [target for _, target in clean]
    assert side(tmp_path / "all", "valid", "de") == side(data, "valid", "de")
    distil(*words, "--gold-share", 0.9, "--output", tmp_path / "mixed")
    mixed = list(zip(*(side(tmp_path / "mixed", "train", x) for x in ("en", "de")), strict=True))
    gold = set(zip(side(data, "train", "en"), side(data, "train", "de"), strict=True))
    assert len(mixed) == round(10 * len(clean)) and set(mixed[len(clean) :]) == gold
    # A translation that does not end is left out.
    place = next(i for i, text in enumerate(found) if text == clean[3][0])
    endless = [
        [" ".join(texts[0].split()[:1] * 60)] if i == place else texts
        for i, texts in enumerate(lists)
    ]
    path = generated(tmp_path / "out", endless)
    printed = distil(*words, "--output", tmp_path / "whole")
    assert "set and 1 that repeat themselves without end" in printed
    rest = [target for _, target in clean[:3] + clean[4:]]
    assert side(tmp_path / "whole", "train", "de") == rest
    line = error_line(
        distil(
            *words, "--nbest", 2, "--choose", "reference", "--output", tmp_path / "no", check=False
        )
    )
    assert "--choose mbr" in line
    # What fairseq-train would add to the result.
    parts = tmp_path / "parts"
    shutil.copytree(data, parts)
    for one in data.glob("train.*"):
        shutil.copy(one, parts / one.name.replace("train.", "train1."))
    line = error_line(distil(parts, *words[1:], "--output", tmp_path / "no", check=False))
    assert f"{parts}: with --sources expected a split of one part, found train1 too" in line
    write_text(tmp_path / "other", "train", [("one", "eins")])
    other = binarise(tmp_path / "other", tmp_path / "few")
    line = error_line(
        distil(
            data, "--generated", path, "--sources", other, "--output", tmp_path / "no", check=False
        )
    )
    assert "--srcdict" in line and not (tmp_path / "no").exists()


def test_a_language_models_translations_are_chosen_by_their_text(
    llm_data: Path, tmp_path: Path
) -> None:
    dictionary = Dictionary.load(str(llm_data / "dict.de.txt"))
    text = LanguageModelText(llm_data, dictionary)
    references = [text.decode(line) for line in side(llm_data, "train", "de")]

    def pieces(*names: str) -> str:
        return " ".join(symbol_of(text._tokenizer._token_of[name], name) for name in names)

    def spelled(line: str) -> str:
        """The same text in pieces of one character."""
        return pieces(*f"▁{line}".replace(" ", "▁"))

    line_end = pieces("<0x0A>")
    # The first has the reference's pieces, but for a word; the second its text, and goes on after it.
    lists = [
        [
            text.encode(f"{line} acht"),
            f"{line_end} {spelled(line)} {line_end} {spelled('eins')}",
        ]
        for line in references
    ]
    assert text.decode(lists[3][1]) == f" {references[3]}"
    path = generated(tmp_path / "out", lists)
    words = (llm_data, "--generated", path)
    distil(*words, "--nbest", 2, "--choose", "reference", "--output", tmp_path / "chosen")
    written = side(tmp_path / "chosen", "train", "de")
    assert [text.decode(line) for line in written] == references
    # Of the translation alone, in the pieces that the model wrote.
    assert all(
        line.split() == spelled(gold).split()
        for line, gold in zip(written, references, strict=True)
    )
    path = generated(tmp_path / "out", [one[1:] for one in lists])
    distil(*words, "--output", tmp_path / "first")
    assert side(tmp_path / "first", "train", "de") == written
    (tmp_path / "part").mkdir()
    link_others(llm_data, tmp_path / "part", [])
    path = generated(tmp_path / "out", lists)
    targets, changed = nearest_to_references(path, tmp_path / "part")
    assert [dictionary.string(one) for one in targets] == written and changed == len(lists)
    # Up to twice the reference and ten tokens.
    gold = training_side(tmp_path / "part", "de")
    longest = [torch.cat([gold[i], gold[i], gold[i].new_ones(10)]) for i in range(len(gold))]
    assert with_an_end(longest, tmp_path / "part").all()
    longest[1] = torch.cat([longest[1], longest[1][:1]])
    assert with_an_end(longest, tmp_path / "part").tolist()[:3] == [True, False, True]
    # A line end within a token, and the tokenizer's own end.
    assert text.translation(text.encode("eins")) == text.encode("eins")
    own = text._tokenizer
    own.decode = lambda tokens: "".join({7: "a", 8: ".\n", 9: "b"}[one] for one in tokens)  # type: ignore[method-assign]
    own.encode = lambda line: {".": [7], "a.": [9]}[line]  # type: ignore[method-assign]
    assert text._line([7, 8, 9], "a.") == [9]
