"""FaceChain-FACT: patch tokens of a face, ahead of the prompt."""

import sys

from facegen.pipelines import GeneratePipeline


def main(photos: list[str], model: str = "sd15", adapter: str = "facechain_fact", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    pipe.load_adapter(adapter)
    out = pipe(faces=photos, prompt="a person in a suit", num_inference_steps=50, guidance_scale=5, seed=7)
    out.save(".", "facechain_fact")


if __name__ == "__main__":
    main(sys.argv[1:])
