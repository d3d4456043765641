"""Scheduler policies: the interface, the built-in ones, and how to find one by name."""

from aioengine.schedulers.parts.base import Ordering as Ordering
from aioengine.schedulers.parts.base import Part as Part
from aioengine.schedulers.parts.base import Preemption as Preemption
from aioengine.schedulers.parts.base import Prefetch as Prefetch
from aioengine.schedulers.parts.base import Replacement as Replacement
from aioengine.schedulers.parts.compose import Composed as Composed
from aioengine.schedulers.policy import API_VERSION as API_VERSION
from aioengine.schedulers.policy import AdapterView as AdapterView
from aioengine.schedulers.policy import CostsView as CostsView
from aioengine.schedulers.policy import Decision as Decision
from aioengine.schedulers.policy import Location as Location
from aioengine.schedulers.policy import MemoryView as MemoryView
from aioengine.schedulers.policy import Place as Place
from aioengine.schedulers.policy import PolicyEvent as PolicyEvent
from aioengine.schedulers.policy import Refusal as Refusal
from aioengine.schedulers.policy import RequestView as RequestView
from aioengine.schedulers.policy import SchedulerPolicy as SchedulerPolicy
from aioengine.schedulers.policy import SchedulerView as SchedulerView
from aioengine.schedulers.policy import SlotState as SlotState
from aioengine.schedulers.policy import SlotView as SlotView
from aioengine.schedulers.policy import WaitingAdaptersView as WaitingAdaptersView
from aioengine.schedulers.policy import WaitingView as WaitingView
from aioengine.schedulers.registry import available_policies as available_policies
from aioengine.schedulers.registry import compose as compose
from aioengine.schedulers.registry import load_policy as load_policy
