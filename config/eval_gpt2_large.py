# The loss of OpenAI's GPT-2 large (774M parameters) on the dataset, OpenWebText unless --dataset= names another.
# Trains nothing. nanoGPT publishes 2.66 (train) and 2.67 (val) on OpenWebText.

init_from = "gpt2-large"
eval_only = True
eval_iters = 500  # many, for a good estimate
batch_size = 8
