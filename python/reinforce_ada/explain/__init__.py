"""What a policy does, in words and exact numbers: `reinforce-ada explain`."""
