"""Prometheus: it records beside every run, and after `make watch` it stays up between runs.

It is the program on PATH or in .tools, without a container or a service; its data lies under
.cache, and it listens on loopback. Once a second it scrapes the load generator's exporter and the
engines, which a run names in two files, with the labels `lab, variant, run_id` that the client's
metrics carry too. Finished runs can be loaded into the same data as blocks (`load`). Not every
build of Prometheus has a graph page, so readers are directed to the live page (`live`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

import psutil
import requests

from serving import atomic
from serving.engines import ENGINES
from serving.models.catalog import CACHE
from serving.packaging.install import find_prometheus
from serving.places import PROGRAM, named_or
from serving.plugins import guard
from serving.processes.ports import LOOPBACK, free_port
from serving.processes.process import Process

HOME = named_or("LABS_PROMETHEUS_DATA", CACHE / "prometheus").resolve()
WATCH_PORT = 9090  # of the one that stays up between labs, unless told otherwise
READY_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 15.0
MISSING = "Prometheus is not installed (`make setup` says how to get it)"
JOBS = ("client", "engine")
ENGINE_KEY = "engine.key"  # as in the configuration
_CONFIG = """\
global:
  scrape_interval: 1s
  scrape_timeout: 1s
scrape_configs:
  - job_name: client
    honor_labels: true
    file_sd_configs:
      - files: ["client.json"]
        refresh_interval: 1s
  - job_name: engine
    authorization: {credentials_file: "engine.key"}
    file_sd_configs:
      - files: ["engine.json"]
        refresh_interval: 1s
    metric_relabel_configs:  # no panel asks for them; the first has a series for every set of
      - source_labels: [__name__]  # adapters that ever ran together
        regex: vllm:lora_requests_info|http_.*|python_.*|.*_created
        action: drop
RENAMES"""


_RENAME = """\
      - source_labels: [__name__]
        regex: {own}(|_bucket|_sum|_count)
        target_label: __name__
        replacement: {name}${{1}}
"""


def config() -> str:
    """Generate the configuration of Prometheus.

    An engine's own names of metrics become the lab's (serving/metrics.py), which the panels use.
    """
    names = [item for engine in ENGINES.values() for item in engine.metric_names.items()]
    renames = "".join(_RENAME.format(own=own, name=name) for own, name in names)
    return _CONFIG.replace("RENAMES", renames)


class PrometheusError(Exception):
    """Prometheus cannot be used; the message says why and how to mend it."""


def argv(port: int) -> list[str]:
    """Write the configuration and return the command that starts it. Raises PrometheusError."""
    binary = find_prometheus(PROGRAM)
    if binary is None:
        raise PrometheusError(MISSING)
    prepare()
    return [
        str(binary),
        f"--config.file={HOME / 'prometheus.yml'}",
        f"--storage.tsdb.path={HOME / 'data'}",
        "--storage.tsdb.retention.size=2GB",  # and no limit of age: runs of last year stay
        f"--web.user-assets={HOME / 'web'}",
        f"--web.config.file={HOME / 'web.yml'}",
        r"--web.cors.origin=http://(127\.0\.0\.1|localhost)(:\d+)?",  # who may read its answers
        f"--web.listen-address={LOOPBACK}:{port}",
    ]


def prepare() -> None:
    """Write the configuration, and empty lists of what to scrape where there are no lists yet.

    Raises PrometheusError.
    """
    try:
        (HOME / "data").mkdir(parents=True, exist_ok=True)
        (HOME / "prometheus.yml").write_text(config())
        if not (HOME / "web.yml").exists():
            write_headers()
        if not (HOME / ENGINE_KEY).exists():
            _write_key("none yet")
        for job in JOBS:
            if not (HOME / f"{job}.json").exists():
                (HOME / f"{job}.json").write_text("[]")
    except OSError as error:
        raise PrometheusError(_unusable(error)) from error


def write_headers(script_hashes: Sequence[str] = ()) -> None:
    """Write what Prometheus puts into the head of every answer, for the browsers that ask.

    Scripts run only from files that it serves, and within a page where they have one of these
    hashes (`sha256-...`); no page is shown within another.
    """
    scripts = " ".join(["'self'", *(f"'{each}'" for each in script_hashes)])
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline';"
        " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "deny",
    }
    content = json.dumps({"http_server_config": {"headers": headers}})  # JSON is YAML
    atomic.write(HOME / "web.yml", content)


def _write_key(key: str) -> None:
    """Write what Prometheus shows an engine that it scrapes; only its owner can read it."""
    atomic.write(HOME / ENGINE_KEY, key, mode=0o600)


def ready(url: str, alive: Callable[[], bool]) -> bool:
    """Wait until it answers; return False when it has ended or READY_TIMEOUT_S are over."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and alive():
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/-/ready", timeout=1).ok:
                return True
        time.sleep(0.1)
    return False


def _locked() -> IO[str]:
    """Lock the data for one run; closing the lock frees it. Raises PrometheusError."""
    try:
        HOME.mkdir(parents=True, exist_ok=True)
        lock = (HOME / "run.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise PrometheusError(
            f"a lab of another checkout records into {HOME}: name another folder with"
            " PROMETHEUS_DATA="
        ) from error
    except OSError as error:
        raise PrometheusError(_unusable(error)) from error
    return lock


def _unusable(error: OSError) -> str:
    return f"Prometheus cannot use {HOME}: {error.strerror}"


def target(url: str, labels: Mapping[str, str]) -> dict[str, object]:
    """Describe what to scrape: the `/metrics` below an address, whatever its scheme and path."""
    address = urlsplit(url if "//" in url else f"//{url}")
    where = {
        "__scheme__": address.scheme or "http",
        "__metrics_path__": f"{address.path.rstrip('/')}/metrics",
    }
    return {"targets": [address.netloc], "labels": {**labels, **where}}


class Prometheus:
    """The Prometheus of one run, or the reason why there is none (`missing`).

    It is the one that `make watch` has started, if that is up; otherwise one that ends with the
    run.
    """

    def __init__(self, log: Path) -> None:
        self.missing: str | None = None
        self.url = self.page_url = ""
        self._log = log
        self._lock: IO[str] | None = None
        self._process: Process | None = None
        self._targets: dict[str, list[dict[str, object]]] = {job: [] for job in JOBS}
        try:
            self._lock = _locked()
            self._start()
        except PrometheusError as error:
            self.missing = str(error)
            self.stop()

    def _start(self) -> None:
        if watch := watching():
            self.url, self.page_url = watch.url, watch.page_url
            self._log = HOME / "watch.log"
            self._write_targets()
            return
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        self.page_url = f"{self.url}/user/"
        command = argv(port)
        self._write_targets()
        self._process = process = Process("prometheus", command, log=self._log)
        if not ready(self.url, lambda: process.returncode is None):
            raise PrometheusError(f"Prometheus did not start: {process.tail(1)}")

    def scrape(self, job: str, url: str, labels: Mapping[str, str] | None = None) -> None:
        """Scrape this address from now on, as the job `client` or `engine`."""
        self._targets[job].append(target(url, labels or {}))
        self._write_targets()

    def forget(self, job: str) -> None:
        """Scrape no address of this job any more."""
        self._targets[job] = []
        self._write_targets()

    def _write_targets(self) -> None:
        if self._lock is None:  # the lists belong to another run
            return
        try:
            if self._targets["engine"]:
                _write_key(guard.key())
            for job, targets in self._targets.items():
                atomic.write(HOME / f"{job}.json", json.dumps(targets))
        except OSError as error:
            self.missing = self.missing or _unusable(error)

    def value(self, expression: str, at_unix_s: float | None = None) -> float | None:
        """Evaluate an instant query, now or at a time; None without a sample or an answer."""
        if self.missing:
            return None
        try:
            return self.known(expression, at_unix_s)
        except requests.ConnectionError:
            self.missing = "Prometheus ended during the run"
        except (requests.RequestException, KeyError, ValueError):
            pass
        return None

    def known(self, expression: str, at_unix_s: float | None = None) -> float | None:
        """Evaluate an instant query as `value` does; None means no such sample, or NaN.

        Raises requests.RequestException without an answer.
        """
        samples = self._result(expression, at_unix_s, timeout_s=10)
        value = float(samples[0]["value"][1]) if samples else math.nan
        return value if math.isfinite(value) else None

    def _result(self, query: str, at_unix_s: float | None, timeout_s: float) -> list[Any]:
        """Return the result of an instant query, as Prometheus's HTTP API lists it."""
        parameters = {"query": query}
        if at_unix_s is not None:
            parameters["time"] = f"{at_unix_s:.3f}"
        response = requests.get(f"{self.url}/api/v1/query", parameters, timeout=timeout_s)
        response.raise_for_status()
        result: list[Any] = response.json()["data"]["result"]
        return result

    def samples(
        self, selector: str, from_unix_s: float, to_unix_s: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Return the samples as they were scraped between two times: labels, and (time, value).

        [] where there are none, or no answer.
        """
        if self.missing:
            return []
        query = f"{selector}[{max(1, math.ceil(to_unix_s - from_unix_s))}s]"
        try:
            result = self._result(query, to_unix_s, timeout_s=30)
        except (requests.RequestException, KeyError, ValueError):
            return []
        return [
            (each["metric"], [(float(at), float(value)) for at, value in each["values"]])
            for each in result
        ]

    def settle(self, expression: str, expected: float, timeout_s: float = 240.0) -> float | None:
        """Wait until the query's value equals `expected`; return the last value in any case.

        A counter is complete in Prometheus only one scrape after its last change, and what does not
        answer within a second is not scraped: on a machine that is busy with other work that may
        last for minutes.
        """
        began = time.monotonic()
        while (value := self.value(expression)) != expected:
            if self._disk_is_full():
                self.missing = f"Prometheus has no space left on its disk ({HOME})"
            if self.missing:
                return None
            if time.monotonic() - began >= timeout_s:
                break
            time.sleep(0.25)
        return value

    def _disk_is_full(self) -> bool:
        """Look for a full disk in the log: Prometheus itself goes on answering with old samples."""
        with contextlib.suppress(OSError):  # a container keeps its log
            return "no space left on device" in self._log.read_text(errors="replace")
        return False

    def stop(self) -> None:
        """Stop scraping for this run, and end Prometheus if it was started for it."""
        for job in JOBS:
            self.forget(job)
        if self._process:
            self._process.stop()
        if self._lock:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


# --------------------------------------------------------------------- one that outlives the labs


@dataclass(frozen=True)
class Watch:
    """A Prometheus that stays up between labs."""

    port: int
    pid: int
    started: str  # distinguishes the process from a later one with its pid
    own: bool  # started by `watch`, not in a container

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def page_url(self) -> str:
        """The live page, or Prometheus's own in a container, where Grafana has the dashboards."""
        return f"{self.url}/user/" if self.own else self.url

    def process(self) -> psutil.Process | None:
        """Find the process; None where it has ended."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if _started(self.pid) == self.started and process.status() != "zombie":
                return process
        return None


def _started(pid: int) -> str:
    """Read when a process started, as `boot id/clock ticks`, which no change of the clock affects.

    Raises psutil.NoSuchProcess.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError as error:
        raise psutil.NoSuchProcess(pid) from error
    return f"{boot}/{ticks}"


def watching() -> Watch | None:
    """Find the Prometheus that `watch` or a container has started; None where it is gone."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        recorded = Watch(**json.loads((HOME / "watch.json").read_text()))
        return recorded if recorded.process() else None
    return None


def watch(port: int) -> Watch:
    """Start a Prometheus that outlives this process. Raises PrometheusError."""
    log = HOME / "watch.log"
    command = argv(port)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
    started = adopt(port, process.pid, own=True)
    if ready(started.url, lambda: process.poll() is None):
        return started
    process.terminate()
    last = (log.read_text(errors="replace").splitlines() or ["it printed no reason"])[-1]
    raise PrometheusError(f"Prometheus did not start: {last} (all of it: {log})")


def adopt(port: int, pid: int, own: bool) -> Watch:
    """Make labs record into this process from now on."""
    adopted = Watch(port, pid, _started(pid), own)
    atomic.write(HOME / "watch.json", json.dumps(asdict(adopted)))
    return adopted


def unwatch() -> bool:
    """End the Prometheus that stays up between labs; return whether there was one."""
    up = watching()
    if up is None or (process := up.process()) is None:
        return False
    process.terminate()
    with contextlib.suppress(psutil.NoSuchProcess):
        try:
            process.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:  # nothing is lost: its write-ahead log has the newest samples
            process.kill()
            process.wait(STOP_TIMEOUT_S)
    (HOME / "watch.json").unlink(missing_ok=True)
    return True


# ------------------------------------------------------------------------------- what is past


def load(samples: Iterable[str]) -> None:
    """Add past samples (OpenMetrics lines with times) to the data, as blocks of their own.

    A Prometheus that is running sees them within a minute. Raises PrometheusError.
    """
    promtool = find_prometheus(PROGRAM, "promtool")
    if promtool is None:
        raise PrometheusError(MISSING)
    try:
        (HOME / "data").mkdir(parents=True, exist_ok=True)
        with (HOME / "load.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for abandoned in HOME.glob("load-*"):  # by a load that was killed
                shutil.rmtree(abandoned)
            _load(promtool, samples)
    except OSError as error:
        raise PrometheusError(_unusable(error)) from error


def _load(promtool: Path, samples: Iterable[str]) -> None:
    with tempfile.TemporaryDirectory(dir=HOME, prefix="load-") as scratch:
        text, blocks = Path(scratch) / "openmetrics.txt", Path(scratch) / "blocks"
        with text.open("w") as file:
            file.writelines(f"{line}\n" for line in samples)
            file.write("# EOF\n")
        promtool_run = subprocess.run(
            [str(promtool), *["tsdb", "create-blocks-from", "openmetrics", "--quiet"],
             str(text), str(blocks)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if promtool_run.returncode:
            output = (promtool_run.stderr or promtool_run.stdout).strip().splitlines()
            reason = output[-1] if output else "no reason given"
            raise PrometheusError(f"promtool could not load the samples: {reason}")
        for block in blocks.iterdir():
            _mark_late(block / "meta.json")
            shutil.move(str(block), HOME / "data" / block.name)  # a rename: it appears whole


def _mark_late(path: Path) -> None:
    """Mark a block as out of order.

    Without the mark, Prometheus would drop on its next start what it has scraped before the block's
    end and not yet written to a block of its own.
    """
    meta = json.loads(path.read_text())
    meta["compaction"]["hints"] = ["from-out-of-order"]
    path.write_text(json.dumps(meta))
