"""PuLID v1.1: a likeness that leaves the prompt its picture."""

import sys

from facegen.pipelines import GeneratePipeline


def main(photos: list[str], model: str = "sdxl", adapter: str = "pulid", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    pipe.load_adapter(adapter)
    look = "a portrait, paper cut"
    out = pipe(faces=photos, prompt=look, manner="style", guidance_scale=7, scheduler="dpm++ karras", seed=7)
    out.save(".", "pulid")


if __name__ == "__main__":
    main(sys.argv[1:])
