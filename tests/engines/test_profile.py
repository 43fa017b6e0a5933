"""A profile on disk: its way there and back, what is refused, and when it no longer holds."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines import profile_device
from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.machine import Gpu
from dspark_edge.engines.profile import (
    CostPoint,
    Profile,
    check_writable,
    graphs_digest,
    profile_name,
    stale_reasons,
)
from dspark_edge.engines.profile_device import Device, changes, probe_device

DEVICE = Device(
    processor="A processor",
    gpu=None,
    cores=2,
    provider="CPUExecutionProvider",
    engine="onnxruntime",
    threads=2,
    governor="performance",
    max_clock_mhz=3000,
    power_mode=None,
    libraries={"onnxruntime": "1.32.0"},
)


def points(costs: dict[tuple[int, int, int], float]) -> tuple[CostPoint, ...]:
    return tuple(CostPoint(*call, seconds, 0.05, 20) for call, seconds in costs.items())


def make_profile(bundle: Bundle, device: Device = DEVICE) -> Profile:
    target = {(1, 1, 100): 0.010, (1, 1, 200): 0.012, (1, 8, 100): 0.017, (1, 8, 200): 0.026}
    return Profile(
        1,
        "2026-01-31T12:00:00Z",
        "0.1.0",
        graphs_digest(bundle.manifest),
        device,
        {
            "target": points(target),
            "drafter": points({(1, 7, 100): 0.002, (1, 7, 200): 0.003}),
            "drafter_drawing": points({(1, 7, 100): 0.004, (1, 7, 200): 0.004}),
            "sampler_greedy": points({(1, 1, 0): 0.0001, (1, 8, 0): 0.0008}),
            "sampler": points({(1, 1, 0): 0.001, (1, 8, 0): 0.008}),
        },
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    source = Path(__file__).parents[1] / "data" / "bundles" / "qwen3_rnn_decomposed"
    return Bundle.open(shutil.copytree(source, tmp_path / "bundle"))


def test_what_is_saved_is_loaded(bundle: Bundle) -> None:
    assert Profile.load(bundle, DEVICE) is None
    profile = make_profile(bundle)
    path = profile.save(bundle)
    assert path == bundle.path / "devices" / DEVICE.fingerprint / "profile.json"
    assert os.listdir(path.parent) == ["profile.json"]
    assert Profile.load(bundle, DEVICE) == profile
    assert Profile.load(bundle, replace(DEVICE, cores=4)) is None  # another device
    bundle.verify()  # the manifest does not record it
    later = replace(profile, measured_at="2026-02-01T12:00:00Z")
    later.save(bundle)
    assert Profile.load(bundle, DEVICE) == later


def test_costs_are_those_of_greedy_rounds_unless_others_are_asked_for(bundle: Bundle) -> None:
    profile = make_profile(bundle)
    assert profile.target_s(1, 1, 150) == pytest.approx(0.011)
    assert profile.target_s(1, 2, 100) == pytest.approx(0.011)
    assert profile.draft_s(1, 150) == pytest.approx(0.0025)
    assert profile.sampler_s(1, 3) == pytest.approx(0.0003)
    drawing = profile.of_sampler("sampler")
    assert drawing.target_s(1, 1, 150) == profile.target_s(1, 1, 150)
    assert drawing.draft_s(1, 100) == pytest.approx(0.004)
    assert drawing.sampler_s(1, 8) == pytest.approx(0.008)
    filtered = profile.of_sampler("sampler_filtered")  # was not measured
    assert filtered.sampler_s(1, 8) == drawing.sampler_s(1, 8)


def test_drafts_of_short_blocks_have_costs_of_their_own(bundle: Bundle) -> None:
    profile = make_profile(bundle)
    (whole,) = {point.width for point in profile.points["drafter"]}
    assert profile.draft_s(1, 100, 3) == profile.draft_s(1, 100, whole) == profile.draft_s(1, 100)  # nothing is known
    shorter = tuple(replace(point, width=3, median_s=point.median_s / 2) for point in profile.points["drafter"])
    both = replace(profile, points={**profile.points, "drafter": (*shorter, *profile.points["drafter"])})
    assert Profile.from_json(json.loads(both.to_text())) == both
    assert both.draft_s(1, 100) == profile.draft_s(1, 100)
    assert both.draft_s(1, 100, 3) == pytest.approx(profile.draft_s(1, 100) / 2)
    assert both.draft_s(4, 100, 3) == pytest.approx(4 * both.draft_s(1, 100, 3))


def test_few_and_uneven_samples_weigh_less() -> None:
    point = CostPoint(1, 1, 0, 0.01, 0.1, 25)
    assert point.deviation_s == pytest.approx(1.2533 * 0.01 * 0.0748 / 5, rel=1e-2)
    assert replace(point, samples=100).deviation_s == pytest.approx(point.deviation_s / 2)
    assert replace(point, spread=0.2).deviation_s > point.deviation_s
    assert replace(point, spread=0.0).deviation_s > 0
    assert replace(point, median_s=0.0).deviation_s > 0


def test_what_the_fingerprint_stands_for() -> None:
    assert len(DEVICE.fingerprint) == 12 and set(DEVICE.fingerprint) <= set("0123456789abcdef")
    for same in (
        replace(DEVICE, threads=1),
        replace(DEVICE, governor=None, max_clock_mhz=None),
        replace(DEVICE, libraries={}),
    ):
        assert same.fingerprint == DEVICE.fingerprint
    others = [
        replace(DEVICE, processor="Another"),
        replace(DEVICE, gpu="A GPU"),
        replace(DEVICE, cores=3),
        replace(DEVICE, provider="CUDAExecutionProvider"),
    ]
    assert len({device.fingerprint for device in (DEVICE, *others)}) == 5


def test_what_makes_a_profile_stale(bundle: Bundle) -> None:
    profile = make_profile(bundle)
    assert stale_reasons(profile, DEVICE, bundle) == ()
    now = replace(DEVICE, threads=1, governor=None, max_clock_mhz=2000, libraries={"onnxruntime": "1.33.0"})
    assert stale_reasons(profile, now, bundle) == (
        "the number of threads was 2 and is 1",
        "the processor's clock governor was performance and is unknown",
        "the processor's highest clock in MHz was 3000 and is 2000",
        "the version of onnxruntime was 1.32.0 and is 1.33.0",
    )
    assert stale_reasons(replace(profile, bundle="0" * 64), DEVICE, bundle) == (
        "the graphs of the bundle are not those that were measured",
    )


def test_another_library_is_a_change() -> None:
    other = replace(DEVICE, libraries={"tensorrt": "10.15"}, engine="tensorrt")
    assert changes(DEVICE, other) == (
        "the engine was onnxruntime and is tensorrt",
        "the version of onnxruntime was 1.32.0 and is unknown",
        "the version of tensorrt was unknown and is 10.15",
    )


def test_the_digest_is_of_graphs_and_weights_alone(bundle: Bundle) -> None:
    manifest = bundle.manifest

    def with_hash(path: str) -> Any:
        files = [replace(record, sha256="0" * 64) if record.path == path else record for record in manifest.files]
        return replace(manifest, files=tuple(files))

    before = graphs_digest(manifest)
    assert graphs_digest(with_hash("config.json")) == before
    changed = {graphs_digest(with_hash(path)) for path in ("target.onnx", "target.onnx.data", "drafter.onnx")}
    assert len(changed) == 3 and before not in changed


def damage(edit: Callable[[Any], None]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        data = json.loads(text)
        edit(data)
        return json.dumps(data)

    return apply


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda text: text[:100], "is damaged, not valid JSON"),
        (lambda text: "[]", "expected an object"),
        (lambda text: "[" * 100_000, "is damaged, not valid JSON"),
        (damage(lambda data: data.update(schema_version=2)), "newer version .schema 2.; upgrade dspark-edge"),
        (damage(lambda data: data.update(extra=1)), "'extra' is not known"),
        (damage(lambda data: data.pop("device")), "'device' is missing"),
        (damage(lambda data: data["device"].update(threads=0)), "device.threads is 0"),
        (damage(lambda data: data.update(bundle="abc")), 'bundle is "abc"'),
        (damage(lambda data: data["points"].pop("target")), "the role 'target' is missing"),
        (damage(lambda data: data["points"].update(other=[])), "points.other is not one of the roles"),
        (damage(lambda data: data["points"].update(sampler=[])), "points.sampler is empty"),
        (
            damage(lambda data: data["points"]["target"].pop()),
            "batch 1 has 3 points, expected one for each of 2 widths x 2 contexts",
        ),
        (damage(lambda data: data["points"]["target"].append(data["points"]["target"][0])), "stands there twice"),
        (damage(lambda data: data["points"]["target"][0].update(median_s=-1)), r"target\[0\].median_s is -1"),
        (damage(lambda data: data["points"]["target"][0].update(median_s=True)), "median_s is true"),
        (damage(lambda data: data["points"]["target"][0].update(median_s=float("nan"))), "median_s is NaN"),
        (damage(lambda data: data["points"]["target"][0].update(median_s=10**400)), "median_s is 1000"),
        (damage(lambda data: data["points"]["target"][0].update(samples=0)), "samples is 0"),
        (
            damage(lambda data: [point.update(width=8 + i) for i, point in enumerate(data["points"]["drafter"])]),
            "expected one for each",
        ),
        (
            damage(lambda data: data["points"].update(sampler=data["points"]["target"])),
            "points of several contexts; expected one",
        ),
    ],
)
def test_damaged_profiles_are_refused_with_advice(bundle: Bundle, spoil: Callable[[str], str], problem: str) -> None:
    path = make_profile(bundle).save(bundle)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(BundleError, match=problem) as caught:
        Profile.load(bundle, DEVICE)
    assert str(path) in str(caught.value) and "measure it anew with `dspark-edge profile`" in str(caught.value)


def test_a_link_out_of_the_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle.path / "devices").symlink_to(tmp_path / "elsewhere")
    for use in (make_profile(bundle).save, lambda one: check_writable(one, DEVICE)):
        with pytest.raises(BundleError, match="points outside its folder"):
            use(bundle)
    with pytest.raises(BundleError, match="points outside its folder"):
        Profile.load(bundle, DEVICE)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_check_of_the_folder_leaves_nothing(bundle: Bundle) -> None:
    before = sorted(os.listdir(bundle.path))
    check_writable(bundle, DEVICE)
    assert sorted(os.listdir(bundle.path)) == before
    path = make_profile(bundle).save(bundle)
    check_writable(bundle, DEVICE)
    assert os.listdir(path.parent) == ["profile.json"]


def test_a_read_only_bundle_is_told_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)  # permissions do not stop a test that runs as root
    for use in (make_profile(bundle).save, lambda one: check_writable(one, DEVICE)):
        with pytest.raises(BundleError, match="is read-only; copy the bundle to where you may write"):
            use(bundle)


def test_a_file_in_the_way_is_named(bundle: Bundle) -> None:
    (bundle.path / "devices").write_text("")
    with pytest.raises(BundleError, match=f"cannot write .*{profile_name(DEVICE)}"):
        check_writable(bundle, DEVICE)


def cpufreq(root: Path, core: int, **files: str) -> None:
    folder = root / f"sys/devices/system/cpu/cpu{core}/cpufreq"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)


def test_clocks_are_read_where_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5})
    device = probe_device("cpu", root=tmp_path)
    assert (device.governor, device.max_clock_mhz, device.power_mode, device.gpu) == (None, None, None, None)
    assert (device.cores, device.threads, device.provider) == (3, 3, "CPUExecutionProvider")
    assert device.processor  # the architecture, where nothing has a name
    cpufreq(tmp_path, 0, scaling_governor="powersave\n", scaling_max_freq="2400000\n")
    cpufreq(tmp_path, 1, scaling_governor="performance\n", scaling_max_freq="3600000\n")
    cpufreq(tmp_path, 5, scaling_governor="", scaling_max_freq="<unknown>\n")
    cpufreq(tmp_path, 6, scaling_governor="userspace\n", scaling_max_freq="9000000\n")  # not ours
    device = probe_device("cpu", threads=1, root=tmp_path)
    assert (device.governor, device.max_clock_mhz) == ("performance and powersave", 3600)
    assert (device.cores, device.threads) == (3, 1)


def test_the_gpu_counts_for_its_providers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = profile_device.probe_nvidia_driver(tmp_path)
    gpu = Gpu("A GPU", (9, 0), 1 << 34)
    monkeypatch.setattr(profile_device, "probe_nvidia_driver", lambda root: replace(driver, gpus=(gpu,)))
    assert probe_device("cpu", root=tmp_path).gpu is None
    on_gpu = probe_device("cuda", root=tmp_path)
    assert (on_gpu.gpu, on_gpu.provider) == ("A GPU", "CUDAExecutionProvider")
    assert on_gpu.fingerprint != probe_device("cpu", root=tmp_path).fingerprint
