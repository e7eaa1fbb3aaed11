#!/usr/bin/env python3
"""How other programs read the history, and how their own stores compare.

    python3 -m venv .venv && .venv/bin/pip install tensorboard mlflow trackio
    .venv/bin/python tests/peers/history.py check target/release/retort STORE [RUN]
    .venv/bin/python tests/peers/history.py bench [--json]

`check` exports a run of a store for TensorBoard and for MLflow, lets their own packages read it back, and compares
every value with `retort metrics get`. `bench` measures the peers' own stores; `PEERS=.venv/bin/python cargo
bench -p retort-tests --bench history` measures retort's and runs this in the same go. Packages that are missing are
told and skipped.
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
    elif sys.argv[1:2] == ["bench"]:
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
    measured = []
    for peer in (bench_mlflow, bench_trackio):
        with tempfile.TemporaryDirectory() as directory:
            try:
                measured.append(peer(directory))
            except ImportError as error:
                print(f"SKIPPED: {error}", file=sys.stderr)
    if sys.argv[2:] == ["--json"]:
        print(json.dumps(measured))
    else:
        for figures in measured:
            print(figures.pop("name"))
            for name, figure in figures.items():
                print(f"  {name}: {figure:.2f}")


class Clock:
    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), cpu()

    def stop(self):
        return time.perf_counter() - self.wall, cpu() - self.cpu


def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def size(path):
    return sum(os.path.getsize(path + end) for end in ("", "-wal") if os.path.exists(path + end))


def bench_mlflow(directory):
    import mlflow as package
    from mlflow.entities import Metric

    path = os.path.join(directory, "mlflow.db")
    package.set_tracking_uri(f"sqlite:///{path}")
    client = package.MlflowClient()
    run = client.create_run("0").info.run_id

    def append(steps):
        client.log_batch(run, metrics=[Metric("loss", value(i), 1_700_000_000_000 + i, i) for i in steps])

    return {
        "name": f"mlflow {package.__version__}",
        **appended(append, [path]),
        "call_microseconds": call(lambda i: client.log_metric(run, "one", value(i), step=i)),
        "series_milliseconds": milliseconds(lambda: client.get_metric_history(run, "loss")),
        "start_milliseconds": milliseconds(
            lambda: command("mlflow", "runs", "list", "--experiment-id", "0", MLFLOW_TRACKING_URI=f"sqlite:///{path}")
        ),
    }


def bench_trackio(directory):
    os.environ["TRACKIO_DIR"] = directory
    import trackio as package
    from trackio.sqlite_storage import SQLiteStorage

    def append(steps):
        SQLiteStorage.bulk_log("bench", "run", [{"loss": value(i)} for i in steps], steps=list(steps))

    return {
        "name": f"trackio {package.__version__}",
        **appended(append, [os.path.join(directory, "bench.db")]),
        "call_microseconds": call(lambda i: SQLiteStorage.log("bench", "run", {"one": value(i)}, step=i)),
        "series_milliseconds": milliseconds(lambda: SQLiteStorage.get_logs("bench", "run")),
        "start_milliseconds": milliseconds(lambda: command("trackio", "list", "runs", "--project", "bench")),
    }


def appended(append, files):
    """40,000 points in batches of 1000, after a first batch for initialisation."""
    append(range(1000))
    points, batch, before = 40_000, 1000, sum(map(size, files))
    clock = Clock()
    for start in range(1000, 1000 + points, batch):
        append(range(start, start + batch))
    wall, used = clock.stop()
    written = sum(map(size, files)) - before
    assert written > 0, files
    return {
        "points_per_second": points / wall,
        "points_per_cpu_second": points / used,
        "bytes_per_point": written / points,
    }


def call(log):
    """The median of 100 calls, in microseconds."""
    times = []
    for i in range(100):
        began = time.perf_counter()
        log(i)
        times.append(time.perf_counter() - began)
    return 1e6 * sorted(times)[50]


def milliseconds(act):
    """The least processor time of three runs."""
    times = []
    for _ in range(3):
        clock = Clock()
        act()
        times.append(clock.stop()[1])
    return 1e3 * min(times)


def command(name, *arguments, **environment):
    """A program in the directory of this Python."""
    path = os.path.join(os.path.dirname(sys.executable), name)
    subprocess.run([path, *arguments], check=True, capture_output=True, env={**os.environ, **environment})


def value(step):
    return ((step * 0x9E3779B97F4A7C15) % (1 << 64) >> 11) / (1 << 53)


if __name__ == "__main__":
    main()
