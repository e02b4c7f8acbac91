"""vLLM's own server, with all that development mode opens, behind the lab's guard."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from serving.engines.vllm import GUARD
from serving.models.catalog import ROOT
from serving.plugins import guard
from tests import with_vllm

pytestmark = pytest.mark.cpu

ASK = """
import json, sys
from starlette.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.tasks import FALLBACK_SUPPORTED_TASKS
from vllm.utils.argparse_utils import FlexibleArgumentParser

guard, key = sys.argv[1:]
argv = ["--model", "none", "--middleware", guard]
args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
app = build_app(args, FALLBACK_SUPPORTED_TASKS)
ask = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False).request
routes = sorted({
    (method, route.path) for route in app.routes for method in getattr(route, "methods", None) or ()
})
held = {"Authorization": f"Bearer {key}"}
print(json.dumps({
    "without": {f"{m} {path}": ask(m, path).status_code for m, path in routes},
    "metrics": ask("GET", "/metrics", headers=held).status_code,
    "page": ask("POST", "/collective_rpc", headers=held | {"Origin": "http://evil"}).status_code,
    "host": ask("GET", "/version", headers=held | {"Host": "evil"}).status_code,
    "adapters": [
        ask("POST", path, headers=held, json={"lora_name": "x", field: "/x"}).status_code
        for path, field in (("/v1/load_lora_adapter", "lora_path"), ("/adapters", "src"))
    ],
}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the server answers; no engine is started behind it."""
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", guard.KEY: "k"}
    env |= {"PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        with_vllm.python("-c", ASK, GUARD, "k"), env={**os.environ, **env}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_no_path_of_vllms_but_health_is_answered_without_the_key(found: dict[str, Any]) -> None:
    assert {"POST /collective_rpc", "POST /reset_prefix_cache", "GET /version"} <= {
        *found["without"]
    }
    answered = {path for path, status in found["without"].items() if status != 401}
    assert answered == {"GET /health"}


def test_the_key_opens_it_but_to_no_other_site(found: dict[str, Any]) -> None:
    assert (found["metrics"], found["page"], found["host"]) == (200, 403, 421)


def test_with_the_key_no_adapter_is_loaded_from_elsewhere(found: dict[str, Any]) -> None:
    assert {"POST /v1/load_lora_adapter", "POST /adapters"} <= {*found["without"]}
    assert found["adapters"] == [403, 403]
