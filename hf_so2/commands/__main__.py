"""`accelerate launch -m hf_so2.commands train …` and `python -m hf_so2.commands train …`."""

from hf_so2.commands import main

if __name__ == "__main__":
    main()
