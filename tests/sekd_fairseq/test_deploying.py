"""A student in CTranslate2, which needs neither torch nor fairseq, gives the same probabilities."""

from pathlib import Path

import numpy as np
import pytest

from sekd_fairseq.generated import printed

from .conftest import ROOT, command, sentence_pairs

ctranslate2 = pytest.importorskip("ctranslate2")


def test_a_students_probabilities(student: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    checkpoint = student[0] / "checkpoint_last.pt"
    command(
        "ctranslate2.converters.fairseq", "--model_path", checkpoint, "--data_dir", data, "--user_dir",
        ROOT / "sekd_fairseq", "--source_lang", "en", "--target_lang", "de", "--output_dir", tmp_path / "model",
    )  # fmt: skip
    model = ctranslate2.Translator(str(tmp_path / "model"))
    pairs = [[side.split() for side in pair] for pair in sentence_pairs(13, seed=2)]
    found = model.score_batch(*map(list, zip(*pairs, strict=True)))
    output = command(
        "fairseq_cli.generate", data, "--user-dir", ROOT / "sekd_fairseq", "--task", "self_evolution_kd",
        "--path", checkpoint, "--gen-subset", "test", "--score-reference", "--cpu",
    )  # fmt: skip
    (tmp_path / "out").write_text(output)
    bits = {sentence: text for _, sentence, text in printed(tmp_path / "out", "P-")}
    assert sorted(bits) == list(range(len(pairs)))
    for sentence, one in enumerate(found):
        expected = np.array(bits[sentence].split(), dtype=float)
        np.testing.assert_allclose(np.array(one.log_probs) / np.log(2), expected, atol=2e-4)
