"""Tiny Shakespeare, the text of two prepare scripts: found on this machine, else downloaded."""

import hashlib
import os

from data.folder import dataset_folder
from nanogpt.errors import UserError
from nanogpt.files import whole_file

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def shakespeare(folder):
    """Path of tiny Shakespeare: input.txt in `folder` or in the other dataset made of it, else downloaded to `folder`.

    UserError where that fails, which says what to do instead."""
    folders = (folder, dataset_folder("shakespeare_char"), dataset_folder("shakespeare"))
    places = [os.path.join(place, "input.txt") for place in folders]
    for path in places:
        if os.path.exists(path):
            return path
    import requests

    print(f"downloading {URL}")
    try:
        response = requests.get(URL, timeout=60)
        is_it = hashlib.sha256(response.content).hexdigest() == SHA256
        reason = "" if is_it else f"HTTP status {response.status_code}, and another SHA-256"
    except requests.RequestException as error:
        reason = type(error).__name__
    if reason:
        raise UserError(f"cannot download {URL} ({reason}): fetch it by other means and save it as {places[0]}")
    with whole_file(places[0]) as f:
        f.write(response.content)
    return places[0]
