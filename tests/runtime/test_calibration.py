"""calibration.json: reading it, refusing it, and what the runtime does with it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime import Generator, SamplingParams
from dspark_edge.runtime.calibration import Calibration, CalibrationData, Fit, Scaling
from dspark_edge.runtime.round import Round

GAMMA = 7
PROMPT = [int(byte) for byte in b"the cat sat on"]


def fit(sampling_temperature: float, temperature: float, below: float, bias: float) -> Fit:
    scaling = Scaling((temperature,) * GAMMA, (below,) * GAMMA, (bias,) * GAMMA)
    none: tuple[None, ...] = (None,) * GAMMA
    return Fit(sampling_temperature, scaling, (500,) * GAMMA, (0.1,) * GAMMA, (0.01,) * GAMMA, none, none)


TWO_FITS = Calibration(
    (fit(0.0, 0.5, 2.0, 0.4), fit(1.0, 1.0, 1.0, 0.0)), CalibrationData("ab" * 32, 2, ("0" * 16, "1" * 16), 128, 0)
)


@pytest.fixture
def bundle_copy(bundle_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))


def write(folder: Path, content: Any) -> Bundle:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "calibration.json").write_text(text)
    return Bundle.open(folder)


def test_a_scaling_of_one_temperature_divides() -> None:
    scaling = Scaling((2.0, 0.5), (2.0, 0.5), (0.0, 1.0))
    first, second = scaling.confidences((2 * math.log(3), 0.0))
    assert first == pytest.approx(0.75)
    assert second == pytest.approx(1 / (1 + math.exp(-1)))
    assert scaling.survival((2 * math.log(3), 0.0)) == pytest.approx((0.75, 0.75 * second))
    assert scaling.confidences((0.0,)) == (0.5,)  # a shortened draft


def test_two_temperatures_bend_the_line_and_keep_the_order() -> None:
    scaling = Scaling((0.5,), (4.0,), (0.0,))
    confidences = [scaling.confidences((logit / 10,))[0] for logit in range(-80, 81)]
    assert all(one < other for one, other in itertools.pairwise(confidences))
    assert scaling.confidences((30.0,))[0] == pytest.approx(1.0)
    # Far from zero the slopes are those of the two temperatures.
    low = [math.log(c / (1 - c)) for c in (scaling.confidences((logit,))[0] for logit in (-21.0, -20.0))]
    assert low[1] - low[0] == pytest.approx(1 / 4)


def test_extreme_logits_overflow_nowhere() -> None:
    for scaling in (Scaling((0.1,), (0.1,), (8.0,)), Scaling((0.1,), (10.0,), (-8.0,))):
        assert scaling.confidences((1e5,))[0] == 1.0
        assert 0 <= scaling.confidences((-1e5,))[0] < 1e-3


def test_a_calibration_is_read_as_it_was_written(bundle_copy: Path) -> None:
    assert Calibration.load(Bundle.open(bundle_copy)) is None
    assert Calibration.load(write(bundle_copy, TWO_FITS.to_json())) == TWO_FITS
    Bundle.open(bundle_copy).verify()  # no recorded file was touched


def test_a_request_between_two_fits_is_interpolated() -> None:
    assert TWO_FITS.at(0.0) == TWO_FITS.fits[0].scaling
    assert TWO_FITS.at(1.0) == TWO_FITS.at(3.0) == TWO_FITS.fits[1].scaling
    between = TWO_FITS.at(0.25)
    assert between.temperatures[0] == pytest.approx(1 / 1.75)
    assert between.temperatures_below[0] == pytest.approx(1 / 0.625)
    assert between.biases[0] == pytest.approx(0.3)
    alone = Calibration(TWO_FITS.fits[1:], TWO_FITS.data)
    assert alone.at(0.0) == alone.at(2.0) == alone.fits[0].scaling


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data = json.loads(json.dumps(TWO_FITS.to_json()))
    change(data)
    return data


DAMAGED = {
    "not JSON": ("{", "is damaged, not valid JSON"),
    "a list": ([], "it holds list, expected an object"),
    "no version": (changed(lambda data: data.pop("schema_version")), "'schema_version' is missing"),
    "newer": (changed(lambda data: data.update(schema_version=2)), "schema version 2, this version reads 1; upgrade"),
    "another method": (changed(lambda data: data.update(method="isotonic")), "'method' is 'isotonic'"),
    "no fits": (changed(lambda data: data.update(fits=[])), "'fits' is \\[\\]"),
    "a short row": (
        changed(lambda data: data["fits"][1]["biases"].pop()),
        "fits\\[1\\]: 'biases' has 6 positions, the drafter's block has 7",
    ),
    "not finite": (changed(lambda data: data["fits"][0]["temperatures"].__setitem__(3, math.nan)), "holds nan"),
    "infinite": (changed(lambda data: data["fits"][0]["biases"].__setitem__(3, math.inf)), "holds inf"),
    "zero": (changed(lambda data: data["fits"][0]["temperatures"].__setitem__(3, 0)), "holds 0, expected .* above 0"),
    "negative": (changed(lambda data: data["fits"][0]["temperatures_below"].__setitem__(3, -1.0)), "holds -1.0"),
    "a text": (changed(lambda data: data["fits"][0]["temperatures"].__setitem__(3, "1")), "holds '1'"),
    "a truth": (changed(lambda data: data["fits"][0]["temperatures"].__setitem__(3, True)), "holds True"),
    "fits fall": (changed(lambda data: data["fits"].reverse()), "\\[1.0, 0.0\\], expected to rise"),
    "samples": (changed(lambda data: data["fits"][0]["samples"].__setitem__(0, 0.5)), "'samples' holds 0.5"),
    "an error": (changed(lambda data: data["fits"][0]["ece_after"].__setitem__(0, 2)), "'ece_after' holds 2"),
    "no data": (changed(lambda data: data.pop("data")), "'data' is missing"),
    "no hash": (changed(lambda data: data["data"].pop("sha256")), "data is damaged: 'sha256' is missing"),
    "digests": (changed(lambda data: data["data"].update(prompt_digests=[1])), "'prompt_digests' is \\[1\\]"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_calibration_is_refused_in_one_line(bundle_copy: Path, damage: str) -> None:
    content, problem = DAMAGED[damage]
    bundle = write(bundle_copy, content)
    with pytest.raises(BundleError, match=problem) as caught:
        Calibration.load(bundle)
    message = str(caught.value)
    assert "calibration.json" in message and "dspark-edge" in message and "\n" not in message


def test_only_speculation_needs_a_calibration_in_order(bundle_copy: Path) -> None:
    write(bundle_copy, "{")
    with pytest.raises(BundleError, match=r"calibration.json is damaged"):
        Generator.open(bundle_copy, threads=1)
    with Generator.open(bundle_copy, mode="plain", threads=1) as plain:
        assert plain.generate(PROMPT, SamplingParams(max_new_tokens=2)).token_ids


def observed(folder: Path, temperature: float, calibration: Calibration | None = None) -> list[Round]:
    rounds: list[Round] = []
    with OnnxRuntimeEngine(Bundle.open(folder), threads=1) as engine:
        generator = Generator(engine, observer=rounds.append, calibration=calibration)
        generator.generate(PROMPT, SamplingParams(max_new_tokens=24, temperature=temperature, seed=1))
    return rounds


@pytest.mark.parametrize("temperature", [0.0, 0.25, 1.0])
def test_the_drafts_of_a_calibrated_bundle_are_calibrated(bundle_copy: Path, temperature: float) -> None:
    plain = observed(bundle_copy, temperature)
    write(bundle_copy, TWO_FITS.to_json())
    rounds = observed(bundle_copy, temperature)
    # The calibration changes what is believed, not what is drafted and said.
    assert [one.draft.token_ids for one in rounds] == [one.draft.token_ids for one in plain]
    assert [one.draft.confidence_logits for one in rounds] == [one.draft.confidence_logits for one in plain]
    scaling = TWO_FITS.at(temperature)
    for before, after in zip(plain, rounds, strict=True):
        logits = after.draft.confidence_logits
        assert logits is not None and len(logits) == GAMMA
        assert before.draft.confidences == Scaling.identity(GAMMA).confidences(logits)
        assert before.draft.confidences == pytest.approx([1 / (1 + math.exp(-logit)) for logit in logits])
        assert after.draft.confidences == scaling.confidences(logits)


def test_a_generator_may_be_given_another_calibration(bundle_copy: Path) -> None:
    write(bundle_copy, "{")  # not even looked at
    for one in observed(bundle_copy, 0.0, Calibration.identity(GAMMA)):
        assert one.draft.confidence_logits is not None
        assert one.draft.confidences == Scaling.identity(GAMMA).confidences(one.draft.confidence_logits)
