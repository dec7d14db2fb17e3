"""Gets models with several vocabularies and gives them one, with its tokenizer; never merges weights."""
