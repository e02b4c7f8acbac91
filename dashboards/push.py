"""The dashboards on a Grafana that already exists: `make grafana-push GRAFANA_URL=...`.

It uses grafana-client, the maintained fork of grafana-api. Data source, folder and dashboards have
fixed uids, and a run's annotation carries its run id, so that pushing again updates what differs
and adds nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from grafana_client import GrafanaApi
from grafana_client.client import GrafanaClientError, GrafanaException
from niquests import Response
from niquests.exceptions import RequestException

from dashboards import boards
from dashboards.panels import DATASOURCE, TAG

FOLDER_UID, FOLDER_TITLE = "inference-lab", "Inference-serving lab"
MOST_REGIONS = 10_000
MOST_ANSWER_BYTES = 32 * 2**20  # a region takes some hundred


class GrafanaError(Exception):
    """Grafana cannot be reached or refuses; the message says how to mend it."""


@dataclass(frozen=True)
class Region:
    """A run as a region of time; one of its tags is `run:` and the run's id."""

    start_ms: int
    end_ms: int
    tags: tuple[str, ...]
    text: str

    @property
    def own_tag(self) -> str:
        """The tag that no other run has."""
        return next(tag for tag in self.tags if tag.startswith("run:"))


def push(url: str, token: str, prometheus_url: str, regions: Sequence[Region]) -> None:
    """Create or update data source, folder, dashboards and regions. Raises GrafanaError."""
    try:
        _push(url, token, prometheus_url, regions)
    except GrafanaError as error:  # Grafana may have repeated what it was shown
        raise GrafanaError(str(error).replace(token, "***") if token else str(error)) from None


def _push(url: str, token: str, prometheus_url: str, regions: Sequence[Region]) -> None:
    grafana, error_text = _connect(url, token), partial(_quoted, token)
    try:
        _datasource(grafana, prometheus_url)
        _folder(grafana)
        for path in sorted(boards.FOLDER.glob("*.json")):
            content = json.loads(path.read_text())
            _require_object(
                grafana.dashboard.update_dashboard(
                    {"dashboard": content, "folderUid": FOLDER_UID, "overwrite": True}
                ),
                "status",
            )
        _regions(grafana, regions)
    except GrafanaClientError as error:
        if error.status_code not in (401, 403):
            raise GrafanaError(
                f"Grafana at {url} did not accept this: {error_text(error)}"
            ) from error
        raise GrafanaError(
            f"Grafana at {url} refused GRAFANA_TOKEN ({error.status_code}, {error_text(error)}):"
            " give the token of a service account with the role Admin, which data sources need; the"
            " Grafana of `make stack` has the dashboards already, and they cannot be changed there"
        ) from error
    except GrafanaException as error:
        raise GrafanaError(
            f"Grafana at {url} failed: {error_text(error)}; try again later"
        ) from error
    except (RequestException, OSError) as error:
        raise GrafanaError(f"Grafana at {url} cannot be reached: is GRAFANA_URL right?") from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise GrafanaError(
            f"what answers at {url} is not Grafana ({type(error).__name__}: {error_text(error)}):"
            " is GRAFANA_URL right?"
        ) from error


def _quoted(token: str, error: Exception) -> str:
    """Quote the beginning of an error, in which Grafana may have repeated what it was shown."""
    text = str(error).replace(token, "***") if token else str(error)
    return " ".join(text.split())[:300]


def _require_object(answer: object, field: str) -> None:
    """Check that an answer is what Grafana says of what it has stored. Raises TypeError."""
    if not isinstance(answer, dict) or field not in answer:
        raise TypeError(f"an answer without {field}")


def _connect(url: str, token: str) -> GrafanaApi:
    if "@" in url:
        raise GrafanaError(
            "GRAFANA_URL contains a user or a password, which would be shown: leave them out and"
            " set GRAFANA_TOKEN"
        )
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise GrafanaError(
            f"GRAFANA_URL={url} is not an address: give one such as http://host:3000"
        )
    if not token:
        raise GrafanaError(
            "GRAFANA_TOKEN is not set: put the token of a Grafana service account (role Admin)"
            " into the environment"
        )
    grafana = GrafanaApi.from_url(url.rstrip("/") + "/", credential=token)
    grafana.client.s.hooks["response"].append(_read_within_bounds)
    return grafana


def _read_within_bounds(response: Response, **_: Any) -> None:
    """Read an answer before its client does. Raises ValueError for one that has no end."""
    body = bytearray()
    for block in response.iter_content(2**16):
        body += block
        if len(body) > MOST_ANSWER_BYTES:
            response.close()
            raise ValueError(f"an answer of more than {MOST_ANSWER_BYTES} bytes")
    response._content = bytes(body)


def _exists(ask: Callable[[str], object], uid: str) -> bool:
    """Tell whether Grafana has what this request asks for. Raises TypeError for another answer."""
    try:
        _require_object(ask(uid), "uid")
    except GrafanaClientError as error:
        if error.status_code == 404:
            return False
        raise
    return True


def _datasource(grafana: GrafanaApi, prometheus_url: str) -> None:
    uid = str(DATASOURCE.uid)
    settings = {
        "uid": uid,
        "name": FOLDER_TITLE,
        "type": DATASOURCE.type_val,
        "access": "proxy",
        "url": prometheus_url,
        "jsonData": {"timeInterval": "1s", "httpMethod": "POST"},
    }
    if _exists(grafana.datasource.get_datasource_by_uid, uid):
        grafana.datasource.update_datasource_by_uid(uid, settings)
    else:
        grafana.datasource.create_datasource(settings)


def _folder(grafana: GrafanaApi) -> None:
    if not _exists(grafana.folder.get_folder, FOLDER_UID):
        grafana.folder.create_folder(FOLDER_TITLE, uid=FOLDER_UID)


def _regions(grafana: GrafanaApi, regions: Sequence[Region]) -> None:
    annotations: dict[str, dict[str, Any]] = {}  # by the tag of the run
    existing = grafana.annotations.find_annotations(tags=[TAG], limit=MOST_REGIONS)
    if not isinstance(existing, list):
        raise TypeError("its annotations are not a list")
    for annotation in existing:
        annotations |= {tag: annotation for tag in annotation["tags"] if tag.startswith("run:")}
    for region in regions:
        fields = {
            "time_from": region.start_ms,
            "time_to": region.end_ms,
            "tags": [TAG, *region.tags],
            "text": region.text,
        }
        present = annotations.get(region.own_tag)
        if present is None:
            grafana.annotations.add_annotation(**fields)
        elif not _is_up_to_date(present, fields):
            grafana.annotations.update_annotation(present["id"], **fields)


def _is_up_to_date(annotation: dict[str, Any], fields: dict[str, Any]) -> bool:
    return (
        (annotation["time"], annotation["timeEnd"]) == (fields["time_from"], fields["time_to"])
        and set(annotation["tags"]) == set(fields["tags"])
        and annotation["text"] == fields["text"]
    )
