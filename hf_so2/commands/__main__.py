"""`accelerate launch -m hf_so2.commands train …` and `python -m hf_so2.commands train …`."""

from hf_so2.commands import main

main()
