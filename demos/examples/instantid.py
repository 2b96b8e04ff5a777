"""InstantID: one photo; the face comes where it is in the photo."""

import sys

from facegen.pipelines import GeneratePipeline


def main(photos: list[str], model: str = "sdxl", adapter: str = "instantid", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    pipe.load_adapter(adapter)
    out = pipe(faces=photos, prompt="portrait in the rain", num_inference_steps=30, guidance_scale=5, seed=7)
    out.save(".", "instantid")


if __name__ == "__main__":
    main(sys.argv[1:])
