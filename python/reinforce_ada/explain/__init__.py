"""The explanation of a policy in words and exact numbers: `reinforce-ada explain`."""
