"""SFT data: any file (files.py) -> rows -> dialogues (rows.py, messages.py, columns.py) -> token ids (load.py).

What a row may hold stands in rows.py, what a message may hold in messages.py, which columns do no harm in columns.py.
"""

from spin_ray.data.load import Loaded, counted, first_rows, load_both, load_prompts
from spin_ray.data.rows import to_messages

__all__ = ["Loaded", "counted", "first_rows", "load_both", "load_prompts", "to_messages"]
