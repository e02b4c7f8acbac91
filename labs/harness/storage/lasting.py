"""The form of a run while it lasts: each trial by itself, so that nothing is ever lost.

predictions.json    written before the first engine starts
probes/*.json.gz    what was asked of the engines beside the load; attention timed by itself
trials/<variant>/<workload>/<load>/<repeat>/requests.jsonl.gz  trial.json
                    telemetry.csv.gz    on a GPU; on a CPU where its energy can be read
                    engine-series.json.gz   where Prometheus scraped the engine's metrics
summary.json        computed from the above
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labs.harness.storage import bounded, engine_series
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.packed import KeptRecords
from labs.harness.storage.recorded import TrialResult
from loadtests import records
from loadtests.records import RequestRecord
from serving.hardware import telemetry


class LastingRun:
    """Reads a run that is not packed, as `packed.PackedRun` reads one that is.

    What cannot be read raises DamagedError.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self.predictions_file, self.summary_file = home / "predictions.json", home / "summary.json"
        self._kept = KeptRecords()

    def probe_file(self, name: str) -> Path:
        """Return the path of what a probe found."""
        return self._home / "probes" / f"{name}.json.gz"

    def trial_folder(self, trial: str) -> Path:
        """Return the path of a trial's folder."""
        return self._home / "trials" / trial

    def trial_result(self, trial: str) -> TrialResult | None:
        """Return what is known of a trial beside its requests; None where it did not end."""
        path = self.trial_folder(trial) / "trial.json"
        return bounded.read_json(path, TrialResult) if path.exists() else None

    def records(self, trial: str) -> list[RequestRecord]:
        """Return the records of a trial's requests; an error where there are none."""
        path = self.trial_folder(trial) / "requests.jsonl.gz"
        version = path, bounded.state(path)
        if (kept := self._kept.get(version)) is not None:
            return kept
        bounded.unpacked_bytes(path)
        try:
            found = records.read_all(path)
        except ValueError as error:
            raise DamagedError(str(error)) from error
        self._kept.put(version, found)
        return found

    def series(self, trial: str) -> list[engine_series.Kept]:
        """Return what was kept of the engine in a trial; [] where nothing was."""
        return engine_series.read(self.trial_folder(trial))

    def telemetry(self, trial: str) -> list[telemetry.Sample]:
        """Return what was sampled of the hardware in a trial; [] where nothing was."""
        path = self.trial_folder(trial) / "telemetry.csv.gz"
        try:
            if path.exists():
                bounded.unpacked_bytes(path, bounded.MOST_PARSED_BYTES)
            return telemetry.read(path)
        except ValueError as error:
            raise DamagedError(str(error)) from error

    def probe(self, name: str) -> Any:
        """Return what a probe found; None where it was not made."""
        path = self.probe_file(name)
        return bounded.parsed(path) if path.exists() else None

    def probes(self) -> dict[str, Any]:
        """Return what each probe found, by its name."""
        files = sorted(self.probe_file("*").parent.glob("*.json.gz"))
        return {path.name.removesuffix(".json.gz"): bounded.parsed(path) for path in files}

    def count(self) -> int:
        """Count the trials and probes on file."""
        patterns = "trials/**/trial.json", "probes/*.json.gz"
        return sum(len(list(self._home.glob(pattern))) for pattern in patterns)
