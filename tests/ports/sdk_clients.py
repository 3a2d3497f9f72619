"""Runs other people's SDKs, unchanged, against a server of the demo model.

python -m venv DIR
DIR/bin/pip install openai-agents 'pydantic-ai-slim[openai,anthropic]' 'litellm[proxy]' instructor \
    anthropic langgraph langchain-openai langchain-anthropic 'ag2[openai,anthropic]' \
    haystack-ai inspect-ai
python -m tests.ports.sdk_clients DIR/bin/python
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.deployments.local_server import serve_locally
from tests.ports.coding_agents import watch_requests

_TIMEOUT_S = 600
_CLIENTS = Path(__file__).parent / "clients"


def main() -> int:
    python, names = sys.argv[1], sys.argv[2:]
    log = watch_requests()
    failed = []
    with serve_locally(max_model_len=2048, num_blocks=600) as server:
        for script in sorted(_CLIENTS.glob("*.py")):
            if names and script.stem not in names:
                continue
            done = subprocess.run(
                [python, str(script), server.url],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
            statuses = Counter((line["path"], line["status"]) for line in log)
            print(f"== {script.stem}: ended with {done.returncode}; {dict(statuses)}")
            print(done.stdout.strip(), flush=True)
            if done.returncode or any(status and status >= 400 for _, status in statuses):
                failed.append(script.stem)
                print(done.stderr[-1500:])
            log.clear()
    print(f"failed: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
