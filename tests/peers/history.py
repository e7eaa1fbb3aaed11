#!/usr/bin/env python3
"""What other programs make of the history, and how they compare.

    python3 -m venv .venv && .venv/bin/pip install tensorboard mlflow trackio
    .venv/bin/python tests/peers/history.py check target/release/retort STORE [RUN]
    .venv/bin/python tests/peers/history.py bench

`check` exports a run of a store for TensorBoard and for MLflow, lets their own packages read it back, and compares
every value with what `retort metrics get` says. `bench` measures the peers' own stores; for retort's figures run
`cargo bench -p retort-tests --bench history` at the same time of day. Packages that are missing are told and skipped.
"""

import json
import math
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time


def main():
    if len(sys.argv) >= 4 and sys.argv[1] == "check":
        check(os.path.abspath(sys.argv[2]), os.path.abspath(sys.argv[3]), *sys.argv[4:5])
    elif sys.argv[1:] == ["bench"]:
        bench()
    else:
        sys.exit(__doc__)


def check(retort, store, run="latest"):
    def ask(*arguments):
        output = subprocess.run([retort, *arguments, "--store", store, "--json"], check=True, capture_output=True)
        return json.loads(output.stdout)

    detail = ask("runs", "show", run)
    series = {}
    for one in ask("metrics", "list", run):
        name = f"{one['stage']}/{one['series']}"
        points = ask("metrics", "get", run, name)
        series[one["stage"], one["series"]] = [(p["step"], float(p["value"])) for p in points]
    pictures = [a for a in detail["artifacts"] if a["meta"].get("preview", "").endswith(".png")]
    print(f"run {detail['id']}: {len(series)} series, {sum(map(len, series.values()))} points, {len(pictures)} pictures")
    with tempfile.TemporaryDirectory() as directory:
        for peer in (tensorboard, mlflow):
            try:
                said = peer(retort, store, directory, detail, series, pictures)
            except ImportError as error:
                print(f"SKIPPED: {error}", file=sys.stderr)
            else:
                print(f"{peer.__name__} {said}")


def tensorboard(retort, store, directory, detail, series, pictures):
    import tensorboard as package
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, IMAGES, SCALARS

    root = os.path.join(directory, "events")
    export = [retort, "runs", "export", detail["id"], "--as", "tensorboard", "-o", root, "--store", store]
    subprocess.run(export, check=True, capture_output=True)
    scalars = images = 0
    for stage in {stage for stage, _ in series} | {picture["stage"] for picture in pictures}:
        events = EventAccumulator(os.path.join(root, detail["id"], stage), size_guidance={SCALARS: 0, IMAGES: 0})
        events.Reload()
        for (of, name), points in series.items():
            if of == stage:
                read = [(event.step, event.value) for event in events.Scalars(name)]
                same([(step, narrow(value)) for step, value in points], read, name)
                scalars += len(read)
        for tag in events.Tags()["images"]:
            for image in events.Images(tag):
                assert image.encoded_image_string.startswith(b"\x89PNG") and image.width > 0 < image.height
                images += 1
    assert images == len(pictures), (images, len(pictures))
    return f"{package.__version__} reads {scalars} scalars and {images} pictures back, all alike (as 32-bit floats)"


def narrow(value):
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def mlflow(retort, store, directory, detail, series, pictures):
    import mlflow as package

    database = os.path.join(directory, "mlflow.db")
    package.set_tracking_uri(f"sqlite:///{database}")
    client = package.MlflowClient()
    client.search_experiments()
    export = [retort, "runs", "export", detail["id"], "--as", "mlflow", "-o", database, "--store", store]
    # Twice: the second replaces the first.
    for _ in range(2):
        subprocess.run(export, check=True, capture_output=True)
    experiment = client.get_experiment_by_name(detail["recipe"])
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.run_name for run in runs] == [detail["id"]], runs
    run = runs[0]
    points = 0
    for (stage, name), expected in series.items():
        history = client.get_metric_history(run.info.run_id, f"{stage}/{name}")
        read = sorted((metric.step, math.nan if metric.value != metric.value else metric.value) for metric in history)
        same([(step, finite(value)) for step, value in expected], read, name)
        points += len(read)
    params = {param["path"]: param["value"] for param in detail["params"]}
    assert set(run.data.params) == set(params), set(params) ^ set(run.data.params)
    for path, value in params.items():
        expected = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        assert run.data.params[path] == expected or isinstance(value, float), (path, value)
    found = sum(
        entry.path.endswith(".png")
        for stage in client.list_artifacts(run.info.run_id)
        for entry in client.list_artifacts(run.info.run_id, stage.path)
    )
    assert found == len(pictures), (found, len(pictures))
    return f"{package.__version__} reads {points} points, {len(params)} parameters and {found} pictures back, all alike"


def finite(value):
    return value if math.isnan(value) else max(-sys.float_info.max, min(sys.float_info.max, value))


def same(expected, read, name):
    assert len(expected) == len(read), (name, len(expected), len(read))
    for (step, value), (read_step, read_value) in zip(expected, read):
        alike = value == read_value or (math.isnan(value) and math.isnan(read_value))
        assert step == read_step and alike, (name, step, value, read_step, read_value)


def bench():
    for peer in (bench_mlflow, bench_trackio):
        with tempfile.TemporaryDirectory() as directory:
            try:
                peer(directory)
            except ImportError as error:
                print(f"SKIPPED: {error}", file=sys.stderr)


class Clock:
    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), cpu()

    def stop(self):
        return time.perf_counter() - self.wall, cpu() - self.cpu


def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def size(path):
    return sum(os.path.getsize(path + end) for end in ("", "-wal") if os.path.exists(path + end))


def told(what, points, took, written, call):
    wall, used = took
    print(
        f"{what}: {points / wall:.0f} points/s by the clock, {points / used:.0f} by processor time; "
        f"{written / points:.1f} bytes a point; a logging call {1e6 * call:.1f} microseconds"
    )


def bench_mlflow(directory):
    import mlflow as package
    from mlflow.entities import Metric

    path = os.path.join(directory, "mlflow.db")
    package.set_tracking_uri(f"sqlite:///{path}")
    client = package.MlflowClient()
    run = client.create_run("0").info.run_id
    before, points, size_of_batch = size(path), 40_000, 1000
    clock = Clock()
    for start in range(0, points, size_of_batch):
        metrics = [Metric("loss", value(i), 1_700_000_000_000 + i, i) for i in range(start, start + size_of_batch)]
        client.log_batch(run, metrics=metrics)
    took = clock.stop()
    began = time.perf_counter()
    for i in range(100):
        client.log_metric(run, "one", value(i), step=i)
    told(f"mlflow {package.__version__}, batches of 1000", points, took, size(path) - before, (time.perf_counter() - began) / 100)
    clock = Clock()
    client.get_metric_history(run, "loss")
    wall, used = clock.stop()
    print(f"mlflow: a series of {points} points read in {1e3 * wall:.0f} ms ({1e3 * used:.0f} ms of processor time)")


def bench_trackio(directory):
    os.environ["TRACKIO_DIR"] = directory
    import trackio as package
    from trackio.sqlite_storage import SQLiteStorage

    points, batch = 40_000, 1000
    clock = Clock()
    for start in range(0, points, batch):
        metrics = [{"loss": value(i)} for i in range(start, start + batch)]
        SQLiteStorage.bulk_log("bench", "run", metrics, steps=list(range(start, start + batch)))
    took = clock.stop()
    files = [os.path.join(directory, name) for name in os.listdir(directory) if name.endswith(".db")]
    began = time.perf_counter()
    for i in range(100):
        SQLiteStorage.log("bench", "run", {"one": value(i)}, step=i)
    told(f"trackio {package.__version__}, batches of 1000", points, took, sum(map(size, files)), (time.perf_counter() - began) / 100)
    clock = Clock()
    SQLiteStorage.get_logs("bench", "run")
    wall, used = clock.stop()
    print(f"trackio: a series of {points} points read in {1e3 * wall:.0f} ms ({1e3 * used:.0f} ms of processor time)")


def value(step):
    return ((step * 0x9E3779B97F4A7C15) % (1 << 64) >> 11) / (1 << 53)


if __name__ == "__main__":
    main()
