"""PhotoMaker: several photos become the word for the person, which `img` follows."""

import sys

from facegen.pipelines import GeneratePipeline


def main(photos: list[str], model: str = "sdxl", adapter: str = "photomaker", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    pipe.load_adapter(adapter)
    out = pipe(faces=photos, prompt="a woman img in a garden", num_inference_steps=50, guidance_scale=5, seed=7)
    out.save(".", "photomaker")


if __name__ == "__main__":
    main(sys.argv[1:])
