# The loss of OpenAI's GPT-2 XL (1558M parameters) on the dataset, OpenWebText unless --dataset= names another.
# Trains nothing. nanoGPT publishes 2.56 (train) and 2.54 (val) on OpenWebText.

init_from = "gpt2-xl"
eval_only = True
eval_iters = 500  # many, for a good estimate
batch_size = 8
