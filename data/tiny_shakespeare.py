"""Tiny Shakespeare, the text of two prepare scripts: found on this machine, else downloaded."""

import hashlib
import os

from data.folder import dataset_folder
from nanogpt.errors import UserError
from nanogpt.files import whole_file

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download(url, path, sha256):
    """Fetches the small file at `url` to `path`, whole and with that SHA-256, or UserError says what to do instead."""
    import requests

    print(f"downloading {url}")
    try:
        response = requests.get(url, timeout=60)
        is_it = hashlib.sha256(response.content).hexdigest() == sha256
        reason = "" if is_it else f"HTTP status {response.status_code}, and another SHA-256"
    except requests.RequestException as error:
        reason = type(error).__name__
    if reason:
        raise UserError(f"cannot download {url} ({reason}): fetch it by other means and save it as {path}")
    with whole_file(path) as f:
        f.write(response.content)


def shakespeare(folder):
    """Path of tiny Shakespeare: input.txt in `folder` or in the other dataset made of it, else downloaded."""
    folders = (folder, dataset_folder("shakespeare_char"), dataset_folder("shakespeare"))
    places = [os.path.join(place, "input.txt") for place in folders]
    for path in places:
        if os.path.exists(path):
            return path
    download(URL, places[0], SHA256)
    return places[0]
