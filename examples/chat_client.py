"""Chat with a server in the terminal, with OpenAI's client. Run ``aioengine serve`` in another terminal.

pip install openai
python examples/chat_client.py --model pirate --system "Rewrite the sentence in pirate speech."
"""

from __future__ import annotations

import argparse
import os

import openai
from openai.types.chat import ChatCompletionMessageParam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--model", help="the base model's name or an adapter's; by default the first there is"
    )
    parser.add_argument("--system", help="system message")
    arguments = parser.parse_args()

    client = openai.OpenAI(base_url=arguments.url, api_key=os.environ.get("AIOENGINE_API_KEY", "none"))
    names = [model.id for model in client.models.list()]
    model = arguments.model or names[0]
    print(f"Models: {', '.join(names)}. Talking to {model}; an empty line ends it.")

    messages: list[ChatCompletionMessageParam] = []
    if arguments.system:
        messages.append({"role": "system", "content": arguments.system})
    while line := input("> ").strip():
        messages.append({"role": "user", "content": line})
        answer = ""
        stream = client.chat.completions.create(
            model=model, messages=messages, stream=True, temperature=0, max_tokens=200
        )
        for chunk in stream:
            text = chunk.choices[0].delta.content or ""
            answer += text
            print(text, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
