"""Chat servers for the tests: one with chosen replies and faults, a real one with tiny models."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from safetensors import safe_open

import toy
from teachers import judge


class ChatServer:
    """
    An OpenAI-compatible server on loopback whose replies a test chooses.

    reply    callable(request, number of this request) -> str, the text; or (status, headers, bytes)
    delay    seconds before it is sent
    """

    def __init__(self, reply, delay=0.0, port=0):
        self.reply, self.delay, self.requests, self.headers = reply, delay, [], []
        self.lock, self.now, self.most_at_once = threading.Lock(), 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers) | {"path": self.path})
                    number = len(outer.requests)
                    outer.now += 1
                    outer.most_at_once = max(outer.most_at_once, outer.now)
                try:
                    time.sleep(outer.delay)
                    answer = outer.reply(body, number)
                finally:
                    with outer.lock:
                        outer.now -= 1
                if callable(answer):
                    return answer(self)
                if isinstance(answer, str):
                    message = dict(role="assistant", content=answer)
                    answer = 200, {}, json.dumps(dict(choices=[dict(message=message)])).encode()
                status, headers, content = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128  # with the default of 5 clients would wait for seconds

        self.http = Listener(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def text_of(request):
    """All text of a request."""
    parts = request["messages"][-1]["content"]
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def steps_of(request):
    """The steps that a judge is asked about, the planted one too."""
    text = text_of(request)
    return json.JSONDecoder().raw_decode(text[text.index("{\n") :])[0]["steps"]


def verdict(request, score=lambda step: 0.5, decoy=0.0):
    """What a judge replies that sees through planted steps."""
    schema = request["response_format"]["json_schema"]["schema"]["properties"]
    scores = [decoy if step in judge.DECOYS else score(step) for step in steps_of(request)]
    assert len(scores) == schema["scores"]["minItems"]
    return json.dumps(dict(ticket=schema["ticket"]["enum"][0], scores=scores))


# ---- a real server

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_with(**special_tokens):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    with safe_open(toy.WEIGHTS, "pt") as file:
        tokenizer = Tokenizer.from_str(file.metadata()["tokenizer"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special_tokens,
    )


def text_config(tokenizer, **more):
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        **ids,
        **more,
    )


def write_internvl(folder):
    """A folder of InternVL3's architecture, random weights."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tokenizer = tokenizer_with(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        vision_config=dict(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=[56, 56],
            patch_size=[14, 14],
        ),
        text_config=text_config(tokenizer, model_type="qwen2"),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    size = dict(height=56, width=56)
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    torch.manual_seed(0)
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_qwen_vl(folder):
    """A folder of Qwen2.5-VL's architecture, random weights."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = tokenizer_with(image_token="<|image_pad|>", video_token="<|video_pad|>")
    tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2])
    config = Qwen2_5_VLConfig(
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=64,
            fullatt_block_indexes=[1],
        ),
        text_config=text_config(tokenizer, rope_parameters=rope),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    size = dict(shortest_edge=56 * 56, longest_edge=56 * 56)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


@contextmanager
def transformers_serve():
    """Runs `transformers serve` -> its URL; a model is asked for by its folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    main = "from transformers.cli.transformers import main; main()"
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = os.environ | dict(HF_HUB_OFFLINE="1")
    server = subprocess.Popen(
        [sys.executable, "-c", main, *words],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            assert server.poll() is None, "transformers serve ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()
