"""Your own workflow: how one sample is made, turn by turn. See asyncrl_api.protocols.Workflow."""

from asyncrl_api.protocols import Session


class SecondTry:
    """Gives the policy two tries; the second one is worth half."""

    async def run(self, session: Session) -> float:
        turn = await session.generate()
        score = await session.score(turn.text)
        if score.reward == 1:
            return 1.0
        session.tell(f"\nNo. {session.prompt}")
        turn = await session.generate()
        return (await session.score(turn.text)).reward / 2
