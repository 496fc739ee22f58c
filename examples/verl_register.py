r"""Registers our losses and advantages in each of verl's processes.

    pip install po-kernels
    export VERL_USE_EXTERNAL_MODULES=verl_register PYTHONPATH=examples
    python -m verl.trainer.main_ppo algorithm.adv_estimator=po_kernels_loo \
        actor_rollout_ref.actor.policy_loss.loss_mode=po_kernels_gspo_verl ...
"""

from po_bilevel.integrations import verl

verl.register()
