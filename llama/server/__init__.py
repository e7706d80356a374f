"""HTTP, in the words of OpenAI's API: `bodies` reads what is asked, `stepper` runs it beside all others, `replies`
writes what is answered; `app` has the addresses, `serving` the process."""
