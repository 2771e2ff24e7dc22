"""Costs read from programs' text: against hand-counted ones, and XLA's own count where it is right."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from vqroi_jax import hlo

# A TPU's program as libtpu writes it, shortened: a loop of five products, each followed by an exchange, in which the
# weights are sliced within a fusion, and a result that is gathered at the end.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=4

%slice_of_weights (param_0.1: bf16[5,256,256], param_1.1: s32[]) -> bf16[256,256] {
  %param_0.1 = bf16[5,256,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)S(6)} parameter(1)
  %constant.1 = s32[]{:T(128)} constant(0)
  %dynamic-slice.1 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.1, %param_1.1, %constant.1, %constant.1), dynamic_slice_sizes={1,256,256}
  ROOT %bitcast.1 = bf16[256,256]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.1), metadata={op_name="a) b(c"}
}

%product (param_0.2: bf16[5,256,256], param_1.2: s32[], param_2.2: f32[10,256]) -> f32[10,256] {
  %param_0.2 = bf16[5,256,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = s32[]{:T(128)S(6)} parameter(1)
  %param_2.2 = f32[10,256]{1,0:T(8,128)} parameter(2)
  %fusion.1 = bf16[256,256]{1,0:T(8,128)(2,1)} fusion(%param_0.2, %param_1.2), kind=kLoop, calls=%slice_of_weights
  ROOT %convolution.1 = f32[10,256]{1,0:T(8,128)} convolution(%param_2.2, %fusion.1), dim_labels=bf_io->bf
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[10,256], bf16[5,256,256])) -> (s32[], f32[10,256], bf16[5,256,256]) {
  %carry = (s32[]{:T(128)}, f32[10,256]{1,0:T(8,128)}, /*index=2*/bf16[5,256,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %h = f32[10,256]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %w = bf16[5,256,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  %fusion.2 = f32[10,256]{1,0:T(8,128)} fusion(%w, %i, %h), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"700"}}
  %all-reduce.1 = f32[10,256]{1,0:T(8,128)S(1)} all-reduce(%fusion.2), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, use_global_device_ids=true, to_apply=%add
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[10,256]{1,0:T(8,128)}, bf16[5,256,256]{2,1,0:T(8,128)(2,1)}) tuple(%next, %all-reduce.1, %w)
}

%condition (carry.1: (s32[], f32[10,256], bf16[5,256,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %carry.1 = (s32[]{:T(128)}, f32[10,256]{1,0:T(8,128)}, bf16[5,256,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (w.1: bf16[5,256,256], x: f32[10,256]) -> f32[40,256] {
  %w.1 = bf16[5,256,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[10,256]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)S(6)} copy(%zero)
  %tuple.2 = (s32[]{:T(128)}, f32[10,256]{1,0:T(8,128)}, bf16[5,256,256]{2,1,0:T(8,128)(2,1)}) tuple(%copy.1, %x, %w.1)
  %while.1 = (s32[]{:T(128)}, f32[10,256]{1,0:T(8,128)}, bf16[5,256,256]{2,1,0:T(8,128)(2,1)}) while(%tuple.2), condition=%condition, body=%body
  %h.1 = f32[10,256]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
  %all-gather-start.1 = (f32[10,256]{1,0:T(8,128)}, f32[40,256]{1,0:T(8,128)}) all-gather-start(%h.1), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %all-gather-done.1 = f32[40,256]{1,0:T(8,128)} all-gather-done(%all-gather-start.1)
}
"""  # noqa: E501


def test_a_program_with_a_loop_and_exchanges_is_counted_as_by_hand():
    cost = hlo.read_cost(TPU)
    assert cost.flops == 5 * 2 * 10 * 256 * 256
    assert cost.cycles == 5 * 700
    assert cost.open_loops == 0
    reduced, gathered = 10 * 256 * 4, 40 * 256 * 4
    assert cost.collectives == (
        hlo.Collective('all-gather', 4, 1, gathered),
        hlo.Collective('all-reduce', 4, 5, 5 * reduced),
    )
    assert cost.sent == pytest.approx(gathered * 3 / 4 + 2 * 5 * reduced * 3 / 4)
    # Of the weights a slice is read each time, not all; ten rows take the space of sixteen; S(1) is not main memory.
    weights, rows = 256 * 256 * 2, 16 * 256 * 4
    fusion, exchange, counting, comparison = weights + 2 * rows, rows, 4 + 4, 4 + 4 + 1
    assert cost.bytes == 5 * (fusion + exchange + counting + comparison) + 4 + 2 * rows


@pytest.mark.parametrize(
    ('attributes', 'group'),
    [
        ('replica_groups={{0,1,2},{3,4,5}}', 3),
        ('replica_groups=[4,8]<=[32]', 8),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ('source_target_pairs={{0,1},{1,0}}', 2),
    ],
)
def test_groups_are_read_in_every_way_of_writing_them(attributes, group):
    text = TPU.replace("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", attributes)
    assert {one.group for one in hlo.read_cost(text).collectives if one.kind == 'all-reduce'} == {group}


def test_a_loop_that_ends_when_its_data_say_so_is_counted_once_and_reported():
    text = TPU.replace('ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT', 'ROOT %lt = pred[] not(%i.1)')
    cost = hlo.read_cost(text)
    assert (cost.flops, cost.open_loops) == (2 * 10 * 256 * 256, 1)


def test_a_loop_that_was_unrolled_by_two_runs_half_as_often():
    text = TPU.replace('%one = s32[]{:T(128)} constant(1)', '%one = s32[]{:T(128)} constant(2)')
    assert hlo.read_cost(text).cycles == 3 * 700


def test_an_instruction_without_a_name_has_that_of_the_loop_that_it_is_in():
    named = TPU.replace(
        'condition=%condition, body=%body', 'condition=%condition, body=%body, metadata={op_name="net/loop"}'
    )
    names = hlo.operation_names(named)
    assert names['bitcast.1'] == 'a) b(c'
    assert {names[one] for one in ('while.1', 'fusion.2', 'convolution.1', 'all-reduce.1', 'lt')} == {'net/loop'}
    assert names['copy.1'] == names['all-gather-done.1'] == ''


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match='entry'):
        hlo.read_cost('HloModule nothing')


def _compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


@pytest.mark.parametrize(
    'options',
    [
        {'window_strides': (2, 2), 'padding': ((1, 2), (0, 1))},
        {'window_strides': (1, 1), 'padding': ((2, 2), (1, 1)), 'lhs_dilation': (2, 3)},
        {'window_strides': (1, 1), 'padding': 'VALID', 'rhs_dilation': (2, 2), 'feature_group_count': 2},
    ],
)
def test_convolutions_are_counted_as_xla_counts_them(options):
    names = ('NHWC', 'HWIO', 'NHWC')
    groups = options.get('feature_group_count', 1)
    compiled = _compiled(
        lambda x, k: lax.conv_general_dilated(x, k, dimension_numbers=names, **options),
        (2, 9, 11, 4),
        (3, 4, 4 // groups, 6),
    )
    assert hlo.read_cost(compiled.as_text()).flops == compiled.cost_analysis()['flops'] > 0


def test_a_scan_is_counted_as_often_as_it_runs():
    def loop(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def unrolled(x, w):
        for one in range(7):
            x = jnp.tanh(x @ w[one])
        return x

    looped, straight = (
        hlo.read_cost(_compiled(function, (8, 32), (7, 32, 32)).as_text()) for function in (loop, unrolled)
    )
    assert looped.flops == straight.flops == 7 * 2 * 8 * 32 * 32
    assert looped.open_loops == straight.open_loops == 0
