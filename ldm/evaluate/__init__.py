"""A model held against the truth of the world that it has learnt.

- `prompts.py`: does it draw what the prompt says? `evaluate` has its pictures read back.
- `attention.py`: where do words look? `evaluate_attention` holds maps against true masks.
- `attention_tables.py`: that one's results, for programs and for people.

Others take `evaluate` and `evaluate_attention`; both return results with `as_dict` and
`as_markdown`.
"""
