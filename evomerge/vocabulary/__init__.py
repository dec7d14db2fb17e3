"""Models with different vocabularies, made to have one: rows are matched by the text of their tokens.

tokenizer    a model's tokenizer, read through transformers
document     tokenizer.json with tokens added or taken out
output       the merged model's vocabulary: token -> row
rows         which row of which model each of its rows is, in every model
aligned      a model whose embedding, head and head bias have those rows
chat         chat templates by name
written      the tokenizer's files and special token ids, to go with the weights
align        `align`, the way in
"""
