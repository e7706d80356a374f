"""Continue four prompts. Under torchrun, or in plain python for one process; flags are `main`'s arguments."""

from typing import Optional

from llama.system.printable import printable
from llama.system.program import as_a_program


def main(
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: Optional[int] = 64,
    max_batch_size: int = 4,
) -> None:
    """Continue four prompts with a model that was trained on text.

    ckpt_dir: a folder with consolidated.NN.pth and params.json; without it, the demo model of this package.
    tokenizer_path: its tokenizer.model; without it, the one in ckpt_dir or in the folder above.
    temperature, top_p: how freely tokens are drawn; temperature 0 takes the best one.
    max_seq_len, max_batch_size: tokens of a prompt and its answer, and prompts, that the cache has room for.
    max_gen_len: tokens to generate at most.
    """
    from llama import Llama  # here, since it takes a second: flags are checked before, and Ctrl-C ends it quietly

    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    prompts = [
        "I believe the meaning of life is",
        "Simply put, the theory of relativity states that ",
        """A brief message congratulating the team on the launch:

        Hi everyone,

        I just """,
        # a few examples, then one more to complete
        """Translate English to French:

        sea otter => loutre de mer
        peppermint => menthe poivrée
        plush girafe => girafe peluche
        cheese =>""",
    ]
    results = generator.text_completion(prompts, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    for prompt, result in zip(prompts, results):
        print(printable(prompt))
        print(printable(f"> {result['generation']}"))
        print("\n==================================\n")


if __name__ == "__main__":
    with as_a_program(main):
        import fire

        fire.Fire(main)
