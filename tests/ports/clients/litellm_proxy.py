"""litellm's proxy before the server: chats, responses and messages, streamed and whole."""

import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from anthropic import Anthropic
from openai import OpenAI

url = sys.argv[1]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
own = {"model": "openai/manta-demo", "api_base": f"{url}/v1", "api_key": "none"}
key = "sk-proxy"
config = {
    "model_list": [{"model_name": "manta-demo", "litellm_params": own}],
    "general_settings": {"master_key": key},
}
with tempfile.TemporaryDirectory() as directory:
    path = Path(directory) / "config.yaml"
    path.write_text(json.dumps(config))  # which is YAML
    command = [str(Path(sys.executable).parent / "litellm"), "--config", str(path)]
    with open(Path(directory) / "log", "w+") as log:
        proxy = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health/liveliness").status_code == 200:
                        break
                except httpx.TransportError:
                    assert proxy.poll() is None, Path(log.name).read_text()[-2000:]
                time.sleep(0.2)
            openai = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
            asked = [{"role": "user", "content": "Repeat these words: sea"}]
            whole = openai.chat.completions.create(
                model="manta-demo", messages=asked, temperature=0, max_tokens=20
            )
            chunks = list(
                openai.chat.completions.create(
                    model="manta-demo", messages=asked, stream=True, max_tokens=20
                )
            )
            print("chat", repr(whole.choices[0].message.content), len(chunks), "chunks")
            told = openai.responses.create(model="manta-demo", input="Repeat these words: sea")
            print("responses", repr(told.output_text))
            claude = Anthropic(base_url=f"http://127.0.0.1:{port}", api_key=key, max_retries=0)
            said = claude.messages.create(model="manta-demo", messages=asked, max_tokens=20)
            print("messages", repr(said.content[0].text))
            with claude.messages.stream(
                model="manta-demo", messages=asked, max_tokens=20
            ) as stream:
                print("messages streamed", repr("".join(stream.text_stream)))
        finally:
            proxy.terminate()
            proxy.wait()
