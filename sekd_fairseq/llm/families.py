"""What a family of language models can do, found by trying it on a few tokens.

transformers has well over a hundred causal families, and they differ where it matters here: in the
arguments that they take, in how they count positions, in whether their key-value cache is right for
padded batches, in what follows the output projection. So nothing is taken from a list: when a model is
built, a padded batch of three short rows is read as training and generation read it, and compared
with the model alone on each row without padding. What is right is used, what can be gone round is gone
round, and a family for which neither holds is refused. That costs reading about a hundred tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.prompt_encoder import PromptEncoder
from sekd_fairseq.llm.vocabulary import NEW_ROW
from sekd_fairseq.logits import capped

#: Logits that differ by less, in the root mean square over that of the logits, are the same: float32
#: gives about 1e-6, a wrong position a tenth or more.
TOLERANCE = 1e-3
#: Lengths of the prompts and of what follows them in the three rows.
PROMPTS, OUTPUTS = (5, 2, 3), (2, 4, 1)
#: A factor that shows what is done to large logits.
LOUD = 1000
#: What the rows have in common at the beginning.
SHARED = 1
#: So many numbers are drawn for :func:`telling_weights` and repeated, and each matrix begins so far after
#: the one before it. Primes: no two rows of a matrix are the same.
DRAWN, STEP = 1_000_003, 15_485_863


@dataclass(frozen=True)
class Traits:
    """What was found to be right for a model.

    Attributes
    ----------
    body
        Where the module is whose features the output embedding turns into the logits, by name; None
        if something else lies between than these two:
    scale
        Factor of the features (Cohere's, Granite's of the logits).
    softcap
        ``c`` of logits that are ``c tanh(z / c)`` of what the output embedding gives (Gemma 2's).
    cache
        Whether the key-value cache is right for padded batches and a reordered beam. Where it is not,
        generation reads every prefix anew.
    """

    body: str | None = None
    cache: bool = False
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Probe:
    """Rows to try a model on, and what it gives for each alone.

    Attributes
    ----------
    prompts, outputs
        Symbols of the three rows.
    expected
        Logits, (length of prompt and outputs, V), of each row.
    symbols, rows
        The symbols that the model knows and its rows of them, (K,); ``rows`` are the columns of
        ``expected``.
    """

    prompts: list[list[int]]
    outputs: list[list[int]]
    expected: list[Tensor]
    symbols: Tensor
    rows: Tensor

    @classmethod
    def of(cls, lm: Any, rows: Sequence[int]) -> "Probe":
        """Of a model as transformers gives it, whose vocabulary has ``rows`` of the symbols.

        Raises
        ------
        UserError
            The model does not read token ids alone, or gives no logits for each.
        """
        known = [symbol for symbol, row in enumerate(rows) if row != NEW_ROW]
        # Neither padding nor the end; and first what a model may take for its padding: some count
        # positions by it.
        pad = getattr(text_config(lm), "pad_token_id", None)
        words = [symbol for symbol in known if symbol not in (1, 2)]
        first = [symbol for symbol in words if pad is not None and pad in (symbol, rows[symbol])]
        count = SHARED + sum(PROMPTS) + sum(OUTPUTS)
        words = first + words[:: max(1, len(words) // count)]
        taken = iter(words * count)
        shared = [next(taken) for _ in range(SHARED)]
        prompts = [shared + [next(taken) for _ in range(length)] for length in PROMPTS]
        outputs = [[next(taken) for _ in range(length)] for length in OUTPUTS]
        versions = [parameter._version for parameter in lm.parameters()]
        expected = [
            alone(lm, [rows[symbol] for symbol in prompt + output])
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        if versions != [parameter._version for parameter in lm.parameters()]:
            # RWKV's layers are scaled for evaluation in place; a checkpoint would hold either.
            raise refused(lm, "weights that evaluation leaves as they are", "others after it")
        return cls(
            prompts, outputs, expected, torch.tensor(known), torch.tensor([rows[i] for i in known])
        )

    def differs(self, row: int, found: Tensor, start: int) -> bool:
        """Whether logits (n, symbols) are others than the row's own from ``start`` on."""
        expected = self.expected[row][start : start + len(found), self.rows]
        return apart(found[:, self.symbols], expected) > TOLERANCE


def alone(lm: Any, tokens: Sequence[int]) -> Tensor:
    """A model's logits for one row without padding, (length, V) float32."""
    try:
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([tokens])).logits
    except Exception as error:  # whatever a family raises
        raise refused(lm, "one that reads token ids alone", error) from error
    if not isinstance(logits, Tensor) or logits.shape[:2] != (1, len(tokens)) or logits.dim() != 3:
        shape = tuple(getattr(logits, "shape", ()))
        raise refused(lm, f"logits for each of {len(tokens)} tokens", f"the shape {shape}")
    if not logits.isfinite().all():
        raise refused(lm, "finite logits", "others; are its weights whole?")
    return logits[0].float()


def refused(lm: Any, expected: str, found: str | Exception) -> UserError:
    """The line that says what a model lacks."""
    if isinstance(found, Exception):
        found = " ".join(f"{type(found).__name__}: {found}".split())[:200]
    return UserError(
        f"{type(lm).__name__} is no model for --arch hf_causal_lm: expected {expected}, found {found}"
    )


def apart(found: Tensor, expected: Tensor) -> float:
    """How far logits are from others, relative to these; a constant at a position does not count."""
    found, expected = (x.float() - x.float().mean(dim=-1, keepdim=True) for x in (found, expected))
    distance, size = float((found - expected).norm()), float(expected.norm())
    if distance != distance:  # not a number
        return float("inf")
    return distance / size if size else distance


def find_traits(decoder: Any, probe: Probe) -> None:
    """Set ``decoder.traits`` to what is right for its model.

    Raises
    ------
    UserError
        In a padded batch the model gives other logits than alone.
    """
    lm = decoder.lm
    previous, encoder_out = _batch(decoder, probe)
    with torch.no_grad():
        tokens = [torch.tensor([p + o]) for p, o in zip(probe.prompts, probe.outputs, strict=True)]
        for i, row in enumerate(tokens):
            if probe.differs(i, alone(lm, row[0].tolist()), 0):
                raise refused(
                    lm,
                    "a vocabulary that only the embedding and the output projection know",
                    "logits that change when their rows are put in the dictionary's order",
                )
        decoder.traits = find_body(lm, tokens[0])
        try:
            logits = decoder(previous, encoder_out)[0]
        except Exception as error:  # whatever a family raises
            raise refused(lm, "one that reads padded batches", error) from error
        if _wrong(probe, logits):
            raise refused(
                lm,
                "logits that depend on the tokens before alone",
                "others in a padded batch; if its config.json has is_decoder, it should be true",
            )
        decoder.traits = replace(decoder.traits, cache=True)
        usual, decoder.shared_prefix = decoder.shared_prefix, SHARED
        try:
            right = not _wrong(probe, decoder(previous, encoder_out)[0])
            right = right and _generates(decoder, probe, previous, encoder_out)
        except Exception:  # whatever a family raises that has another cache or none
            right = False
        decoder.traits, decoder.shared_prefix = replace(decoder.traits, cache=right), usual
        decoder.train(decoder.training)  # forgets the prefix that it shared


def find_body(lm: Any, tokens: Tensor) -> Traits:
    """The module whose features the output embedding turns into the logits, and what else is done to
    these."""
    projection = lm.get_output_embeddings()
    if not isinstance(projection, nn.Linear):
        return Traits()
    expected = lm(input_ids=tokens).logits
    # A cap on the logits does not show while they are small, as those of a new model are.
    with _louder(projection):
        loud = lm(input_ids=tokens).logits
    for name in ("model", lm.base_model_prefix):
        body = getattr(lm, name, None)
        for scale, softcap in _endings(text_config(lm)):
            try:
                features = body(input_ids=tokens).last_hidden_state  # type: ignore[misc]
                z = projection(features * scale)
                same = apart(capped(z, softcap), expected) <= TOLERANCE / 10
                if same and apart(capped(LOUD * z, softcap), loud) <= TOLERANCE:
                    return Traits(name, scale=scale, softcap=softcap)
            except Exception:  # whatever a module raises that is no such body
                break
    return Traits()


def _endings(config: Any) -> list[tuple[float, float | None]]:
    """Factor and cap that a configuration may have for its logits, the usual first."""
    known = {
        name: float(getattr(config, name, None) or 0.0)
        for name in (
            "logit_scale",
            "logits_scaling",
            "lm_head_multiplier",
            "final_logit_softcapping",
        )
    }
    factors = [known["logit_scale"], known["lm_head_multiplier"]]
    factors += [1 / known["logits_scaling"]] if known["logits_scaling"] else []
    endings: list[tuple[float, float | None]] = [(1.0, None)]
    endings += [(factor, None) for factor in factors if factor]
    return endings + [(1.0, cap) for cap in [known["final_logit_softcapping"]] if cap]


@contextmanager
def _louder(projection: nn.Module) -> Iterator[None]:
    hook = projection.register_forward_hook(lambda module, inputs, output: output * LOUD)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def telling_weights(lm: Any) -> Iterator[None]:
    """Weights by which a mistake shows, in place of a model's own until the end: those of a new model are
    so small that attention, for one, is even. Of matrices by their width, others a little moved.

    The matrices are parts of a few large tensors, so that a model whose own weights are not there yet
    needs no memory for them.
    """
    parameters = list(lm.parameters())
    own = [parameter.data for parameter in parameters]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(DRAWN, generator=generator)
    widths = {parameter.size(-1) for parameter in parameters if parameter.dim() > 1}
    pools = {}
    for width in widths:
        largest = max(p.numel() for p in parameters if p.dim() > 1 and p.size(-1) == width)
        pools[width] = (drawn * width**-0.5).repeat(1 + -(-largest // DRAWN))
    try:
        for number, parameter in enumerate(parameters):
            if parameter.dim() > 1:
                start = number * STEP % DRAWN
                part = pools[parameter.size(-1)][start : start + parameter.numel()]
                parameter.data = part.view(parameter.shape).to(parameter.dtype)
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = parameter.data + 0.1 * noise.to(parameter.dtype)
        yield
    finally:
        for parameter, before in zip(parameters, own, strict=True):
            parameter.data = before


def _batch(decoder: Any, probe: Probe) -> tuple[Tensor, dict[str, list[Any]]]:
    """The probe as fairseq gives a batch: previous outputs (B, T), and the prompts."""
    pad, eos = decoder.dictionary.pad(), decoder.dictionary.eos()
    width = max(map(len, probe.prompts))
    sources = torch.tensor([[pad] * (width - len(row)) + [*row, eos] for row in probe.prompts])
    width = max(map(len, probe.outputs))
    previous = torch.tensor([[eos, *row] + [pad] * (width - len(row)) for row in probe.outputs])
    return previous, PromptEncoder(decoder.dictionary, decoder.positions)(sources)


def _wrong(probe: Probe, logits: Tensor) -> bool:
    """Whether logits of the batch (B, T, V) are not each row's own."""
    return any(
        probe.differs(i, logits[i, : len(output) + 1], len(prompt) - 1)
        for i, (prompt, output) in enumerate(zip(probe.prompts, probe.outputs, strict=True))
    )


def _generates(
    decoder: Any, probe: Probe, previous: Tensor, encoder_out: dict[str, list[Any]]
) -> bool:
    """Whether step by step, with a beam that is reordered on the way, gives the same."""
    encoder = PromptEncoder(decoder.dictionary, decoder.positions)
    state: dict[str, Any] = {}
    order = [0, 0, *range(1, len(probe.prompts))]
    encoder_out = encoder.reorder_encoder_out(encoder_out, torch.tensor(order))
    for step in range(1, previous.size(1) + 1):
        if step == 3:
            turn = torch.arange(len(order)).roll(-1)
            decoder.reorder_incremental_state_scripting(state, turn)
            encoder_out = encoder.reorder_encoder_out(encoder_out, turn)
            order = [order[i] for i in turn.tolist()]
        logits = decoder(previous[order][:, :step], encoder_out, incremental_state=state)[0]
        for place, i in enumerate(order):
            start = len(probe.prompts[i]) + step - 2
            if step <= len(probe.outputs[i]) + 1 and probe.differs(i, logits[place], start):
                return False
    return True


def text_config(lm: Any) -> Any:
    """The part of a model's configuration that is about text."""
    return lm.config.get_text_config()


def positions_of(lm: Any) -> int:
    """The most tokens that a model reads; a million where it has no limit of its own."""
    config = text_config(lm)
    names = ("max_position_embeddings", "max_seq_len")
    given = [getattr(config, name, None) for name in names]
    positions = min((int(limit) for limit in given if limit and limit > 0), default=10**6)
    # RoBERTa's relatives count positions from the one after that of padding.
    offsets = [
        module.padding_idx + 1
        for name, module in lm.named_modules()
        if isinstance(module, nn.Embedding)
        and "position" in name.rpartition(".")[2]
        and module.num_embeddings == positions
        and module.padding_idx is not None
    ]
    return positions - max(offsets, default=0)
