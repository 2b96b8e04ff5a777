"""PreciseControl: a face's code in StyleGAN, as e4e saves it (.pth), as the word `sks`, with a beard."""

import sys
from pathlib import Path

from facegen.adapter import AdapterRequest, load_adapter
from facegen.checkpoints import content
from facegen.pipelines import GeneratePipeline


def main(codes: list[str], model: str = "sd21", adapter: str = "precisecontrol", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    wish = AdapterRequest(prompt="a photo of sks person as a chef", edits={"beard": 1.5})
    person = load_adapter(adapter, pipe.model)
    words = person.conditions_from_embeddings(content(Path(codes[0])), pipe.model, wish)
    pipe(conditions=words, guidance_scale=5, num_inference_steps=50, seed=7).save(".", "precisecontrol")


if __name__ == "__main__":
    main(sys.argv[1:])
