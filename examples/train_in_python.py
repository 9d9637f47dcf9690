"""A run from Python, in seconds: `python train_in_python.py`. The same lines work in the cells of a notebook.

The records are a list and the reward is a function of this file; a callback ends the run once sampling goes well enough. A second call with
`resume=True` would go on from there.
"""

import reinforce_ada

sums = [{"prompt": f"{a} + {b} =", "answer": a + b} for a in range(8) for b in range(8) if a + b < 10]


def score(prompt, completion):
    """1 for the right number, .2 for any other."""
    given = completion.strip()
    return 1.0 if given == str(prompt.data["answer"]) else 0.2 * given.isdecimal()


def watch(record, view):
    """Print the share of right answers, and end the run early at 90 %."""
    if record["kind"] == "step":
        print(f"after step {view.step} of {view.config.training.steps}: reward {record['first_round_reward']:.2f}")
        if record["first_round_reward"] > 0.9:
            raise reinforce_ada.StopTraining("good enough")


run = reinforce_ada.train(
    "tiny",  # a two-layer Llama made on the spot; "smollm2", a folder or a hub id for a real one
    sums,
    score,
    callbacks=[watch],
    out="runs/train_in_python",
    engine="transformers",
    preset="reinforce-ada-balance",
    steps=4,
    prompts_per_step=8,
    group_size=4,
    max_tokens=8,
    learning_rate=1e-3,
    lr_schedule="cosine",
    eval_prompts=8,
    eval_k=4,
)
print(run)
print(f"{run.after['avg_at_k'] - run.before['avg_at_k']:+.3f} after {len(run.history)} steps; the model is in {run.model}")
