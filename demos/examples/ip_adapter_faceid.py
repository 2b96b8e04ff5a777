"""IP-Adapter-FaceID: a likeness that obeys the prompt and takes any style."""

import sys

from facegen.pipelines import GeneratePipeline


def main(photos: list[str], model: str = "sd15", adapter: str = "ip_adapter_faceid", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    pipe.load_adapter(adapter)
    out = pipe(faces=photos, prompt="a person on a bike", num_inference_steps=30, guidance_scale=7.5, seed=7)
    out.save(".", "ip_adapter_faceid")


if __name__ == "__main__":
    main(sys.argv[1:])
