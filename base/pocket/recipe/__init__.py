"""How the pocket base was made: scenes, questions, tokenizer, rows, training and evaluation. Runs offline."""
