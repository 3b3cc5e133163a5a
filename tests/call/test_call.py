"""kvsig.call: every function and variant of the registry gets each argument in its place."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from future import NEXT_TEXT, last

import kvsig
from kvsig import _core, emulated, registry
from kvsig._marshal import pack, unpack
from kvsig.registry import CType

REGISTRY = registry.load()
NEWEST = "13.5"


def versions(function, variant):
    """Versions of runtime and driver at which a variant is called: its first, and its last."""
    if function.library != "cudart":
        last = NEWEST if variant.open else registry.format_version(variant.before - 1000 + 90)
        return [f"13.0/{registry.format_version(variant.since)}", f"12.6/{last}"]
    first = registry.format_version(variant.since)
    if variant.open:
        return [first, NEWEST]
    last = variant.before - 1000 + 90 if variant.before % 1000 == 0 else variant.before - 10
    return list(dict.fromkeys([first, registry.format_version(last)]))


CASES = [
    pytest.param(function, variant, spec, id=f"{function.name}-{spec}")
    for function in REGISTRY.functions.values()
    for variant in function.variants
    for spec in versions(function, variant)
]


@pytest.fixture
def bind():
    """Bind kvsig to an emulated runtime, and return its Control."""
    bound = []

    def go(spec):
        _core.rebind(f"emulated:{spec}")
        control = emulated.Control(_core.info()["library"])
        control.reset()
        bound.append(control)
        return control

    yield go
    for control in bound:
        control.reset()
    _core.rebind(None)


def distinct(param, position):
    """A value that no other argument has, as Python gives it and as the recorder shows it."""
    ctype = REGISTRY.resolve(param.type)
    if ctype.pointers:
        value = 0x7F00_0000_1000 + position * 0x1000
    elif ctype.name in REGISTRY.structs:
        assert [field.declaration for field in REGISTRY.structs[ctype.name].fields] == [
            "enum cudaMemLocationType type", "int id",
        ]  # fmt: skip
        fields = {"type": 70 + position, "id": -7 - position}
        return fields, {"bytes": struct.pack("=ii", fields["type"], fields["id"]).hex()}
    elif ctype.name in REGISTRY.enums:
        value = 300 + position
    elif ctype.base == "int":
        value = -40 - position
    elif ctype.base == "unsigned int":
        value = 0xF000_0000 + position
    else:
        assert ctype.base in ("size_t", "unsigned long long", "unsigned long"), param.declaration
        value = 2**63 + position
    return value, {"value": value}


@pytest.mark.parametrize(("function", "variant", "spec"), CASES)
class TestEveryVariant:
    def called(self, control, function, arguments):
        _core.row_of(function.name)  # a library that is optional is opened and tells its version
        control.stub()
        control.record()
        result = kvsig.call(function.name, **arguments)
        (call,) = control.calls(function.name)
        return result, call

    def test_each_argument_arrives_in_its_place(self, bind, function, variant, spec):
        control = bind(spec)
        arguments, expected = {}, []
        for position, param in enumerate(variant.params):
            arguments[param.name], shown = distinct(param, position)
            expected.append({"name": param.name, "type": str(param.type), **shown})
        _, call = self.called(control, function, arguments)
        assert call["symbol"] == variant.symbol
        assert call["variant"] == variant.label
        assert call["arguments"] == expected

    def test_what_nobody_gives_comes_from_the_registry(self, bind, function, variant, spec):
        control = bind(spec)
        arguments = {
            param.name: distinct(param, position)[0]
            for position, param in enumerate(variant.params)
            if param.value is None and not param.out
        }
        result, call = self.called(control, function, arguments)
        outs = [param for param in variant.params if param.out]
        places = [a["value"] for a, p in zip(call["arguments"], variant.params, strict=True)
                  if p.out]  # fmt: skip
        assert len(set(places)) == len(outs) and 0 not in places
        for argument, param in zip(call["arguments"], variant.params, strict=True):
            if param.value is not None and param.name not in arguments:
                assert argument["value"] == constant(param.value)
        if len(outs) > 1:
            assert list(result) == [param.name for param in outs]
        elif outs:
            # The stub writes nothing, so the value is what the buffer began with.
            empty = REGISTRY.resolve(outs[0].type).name == "cudaPointerAttributes"
            assert result["device"] == 0 if empty else result == 0
        elif function.result:
            assert result == 0
        elif REGISTRY.resolve(function.returns).pointers:
            assert isinstance(result, str)
        else:
            assert result is None


def constant(value):
    if isinstance(value, int):
        return value
    return next(e.constants[value] for e in REGISTRY.enums.values() if value in e.constants)


class TestTraps:
    @pytest.mark.known_failure("suffixed-symbol")
    @pytest.mark.parametrize("spec", ["12.0", "12.6", "12.8", "12.9"])
    def test_capture_info_of_12_never_takes_the_plain_symbol(self, bind, spec):
        """The plain symbol of 12.x has the three parameters of 11.x; the emulated one aborts."""
        control = bind(spec)
        with emulated.Stream(control) as stream:
            control.record()
            found = kvsig.call("cudaStreamGetCaptureInfo", stream=stream.cuda_stream)
        (call,) = control.calls("cudaStreamGetCaptureInfo")
        assert call["symbol"] == "cudaStreamGetCaptureInfo_v2"
        assert found["captureStatus_out"] == 0
        plain = _core.info()["library"]
        row = rows()["cudaStreamGetCaptureInfo"]
        assert row["symbol"] == "cudaStreamGetCaptureInfo_v2"
        assert emulated.Control(plain).library.cudaStreamGetCaptureInfo is not None

    @pytest.mark.parametrize("spec", ["11.8", "13.0"])
    def test_capture_info_elsewhere_takes_it(self, bind, spec):
        control = bind(spec)
        control.record()
        kvsig.call("cudaStreamGetCaptureInfo", stream=2)
        assert control.calls("cudaStreamGetCaptureInfo")[0]["symbol"] == "cudaStreamGetCaptureInfo"

    @pytest.mark.known_failure("swapped-parameters")
    @pytest.mark.parametrize(("spec", "order"), [("12.9", ("hSrc", "hDst")),
                                                ("13.0", ("hDst", "hSrc"))])  # fmt: skip
    def test_swapped_parameters_follow_their_names(self, bind, spec, order):
        control = bind(spec)
        control.stub()
        control.record()
        kvsig.call("cudaGraphKernelNodeCopyAttributes", hSrc=0x1000, hDst=0x2000)
        (call,) = control.calls("cudaGraphKernelNodeCopyAttributes")
        values = {"hSrc": 0x1000, "hDst": 0x2000}
        assert [(a["name"], a["value"]) for a in call["arguments"]] == [
            (name, values[name]) for name in order
        ]


def rows():
    return {row["name"]: row for row in _core.info()["functions"]}


PREFETCH = {
    "devPtr": 0x10000, "count": 64, "dstDevice": 0, "location": {"type": 1, "id": 0}, "stream": 2,
}  # fmt: skip
ADVISE = {
    "devPtr": 0x10000, "count": 64, "advice": "cudaMemAdviseSetReadMostly", "device": 0,
    "location": (1, 0),
}  # fmt: skip


class TestOneLineForBothMajors:
    @pytest.mark.parametrize("spec", ["11.8", "12.9", "13.0", "13.5"])
    def test_what_only_another_variant_has_is_dropped(self, bind, spec):
        control = bind(spec)
        control.stub()
        control.record()
        assert kvsig.call("cudaMemPrefetchAsync", **PREFETCH) is None
        assert kvsig.call("cudaMemAdvise", **ADVISE) is None
        prefetch, advise = control.calls()
        old = spec < "13"
        names = [argument["name"] for argument in prefetch["arguments"]]
        assert ("dstDevice" in names) == old and ("location" in names) != old
        assert advise["arguments"][2]["value"] == 1
        if not old:
            assert advise["arguments"][3]["bytes"] == "0100000000000000"

    def test_managed_memory_for_real(self, bind):
        for spec in ("12.9", "13.0"):
            bind(spec)
            pointer = kvsig.call("cudaMallocManaged", size=1 << 16)
            kvsig.call("cudaMemAdvise", **{**ADVISE, "devPtr": pointer})
            kvsig.call("cudaMemPrefetchAsync", **{**PREFETCH, "devPtr": pointer})
            assert kvsig.call("cudaFree", devPtr=pointer) is None


class TestResults:
    def test_one_several_none_and_text(self, bind):
        bind("12.9/13.0")
        assert kvsig.call("cudaRuntimeGetVersion") == 12090
        assert kvsig.call("cudaDriverGetVersion") == 13000
        assert set(kvsig.call("cudaMemGetInfo")) == {"free", "total"}
        assert kvsig.call("cudaDeviceSynchronize") is None
        assert kvsig.call("cudaGetErrorName", error=801) == "cudaErrorNotSupported"
        assert kvsig.call("cudaGetErrorString", error=801) == "operation not supported"
        assert kvsig.call("cuGetErrorName", error=807) == "CUDA_ERROR_MPS_SERVER_NOT_READY"

    def test_a_code_that_is_the_answer_raises_nothing(self, bind):
        bind("13.0")
        with pytest.raises(_core.CudaError):
            kvsig.call("cudaSetDevice", device=99)
        assert kvsig.call("cudaPeekAtLastError") == 0

    def test_struct_as_result(self, bind):
        bind("13.0")
        buffer = np.zeros(16, np.uint8)
        found = kvsig.call("cudaPointerGetAttributes", ptr=buffer)
        assert found["type"] == 0 and len(found["reserved"]) == 8
        device = kvsig.call("cudaMalloc", size=64)
        assert kvsig.call("cudaPointerGetAttributes", ptr=device)["type"] == 2
        kvsig.call("cudaFree", devPtr=device)

    def test_none_is_null_and_arrays_are_their_address(self, bind):
        control = bind("13.0")
        control.stub()
        control.record()
        array = np.zeros(4, np.uint8)
        kvsig.call("cudaMemcpyAsync", dst=None, src=array, count=4, stream=None)
        values = [a["value"] for a in control.calls()[0]["arguments"]]
        assert values == [0, array.ctypes.data, 4, 4, 0]

    def test_a_struct_behind_a_pointer(self, bind):
        control = bind("13.0")
        with emulated.Stream(control) as stream:
            source, target = np.arange(8, dtype=np.uint8), np.zeros(8, np.uint8)
            lists = [np.array([a], np.uint64) for a in
                     (target.ctypes.data, source.ctypes.data, 8, 0)]  # fmt: skip
            control.record()
            kvsig.call(
                "cudaMemcpyBatchAsync", dsts=lists[0], srcs=lists[1], sizes=lists[2], count=1,
                attrs={"srcAccessOrder": "cudaMemcpySrcAccessOrderStream", "dstLocHint": (1, 3),
                       "flags": 1},
                attrsIdxs=lists[3], numAttrs=1, stream=stream,
            )  # fmt: skip
            stream.synchronize()
        (call,) = control.calls("cudaMemcpyBatchAsync")
        raw = struct.pack("=i2i2iI", 1, 0, 0, 1, 3, 1).hex()
        assert call["observed"]["attributes"][0]["bytes"] == raw
        assert (target == source).all()

    def test_structs_within_a_struct_and_arrays_in_them(self, bind):
        bind("13.0")
        source, target = np.arange(1, 25, dtype=np.uint8).reshape(3, 8), np.zeros((3, 4), np.uint8)
        with emulated.Stream() as stream:
            kvsig.call(
                "cudaMemcpy3DAsync", stream=stream,
                p={"srcPtr": (source, 8, 8, 3), "dstPtr": {"ptr": target, "pitch": 4},
                   "extent": (4, 3, 1), "kind": "cudaMemcpyDefault"},
            )  # fmt: skip
            stream.synchronize()
        assert (target == source[:, :4]).all()

    @pytest.mark.parametrize("name", REGISTRY.structs)
    def test_what_goes_into_a_struct_comes_out_again(self, name):
        numbers = itertools.count(1)

        def filled(ctype):
            inner = REGISTRY.resolve(ctype)
            if inner.pointers or inner.name not in REGISTRY.structs:
                return next(numbers)
            return {
                field.name: [filled(field.type) for _ in range(field.length)]
                if field.length
                else filled(field.type)
                for field in REGISTRY.structs[inner.name].fields
            }

        ctype = CType(name)
        value = filled(ctype)
        assert unpack(REGISTRY, ctype, pack(REGISTRY, ctype, value, name)) == value

    def test_events_stand_for_their_handles(self, bind):
        control = bind("13.0")
        control.stub()
        control.record()
        kvsig.call("cudaEventRecord", event=SimpleNamespace(cuda_event=77), stream=None)
        assert [a["value"] for a in control.calls()[0]["arguments"]] == [77, 0]


def refuses(kind, text, function, **arguments):
    with pytest.raises(kind) as caught:
        kvsig.call(function, **arguments)
    assert str(caught.value) == text


class TestRefusals:
    @pytest.fixture(autouse=True)
    def bound(self, bind):
        self.control = bind("13.0")
        self.control.record()
        yield
        # Whatever was refused never reached the library.
        assert self.control.calls() == []

    def test_unknown_function(self):
        path = REGISTRY.path
        refuses(
            ValueError,
            f"'cudaMemPrefetchAsinc' is not in {path}; did you mean cudaMemPrefetchAsync?",
            "cudaMemPrefetchAsinc",
        )
        refuses(ValueError, f"'xyz' is not in {path}", "xyz")

    def test_missing_arguments_lists_what_the_variant_needs(self):
        refuses(
            TypeError,
            "cudaMemPrefetchAsync of 13.0 to before 14.0 needs 'size_t count',"
            " 'struct cudaMemLocation location'; all that it needs: const void *devPtr;"
            " size_t count; struct cudaMemLocation location; cudaStream_t stream",
            "cudaMemPrefetchAsync", devPtr=1, dstDevice=0, stream=2,
        )  # fmt: skip

    def test_unknown_argument(self):
        refuses(
            TypeError,
            "cudaMemPrefetchAsync has no parameter 'dstDevise'; 13.0 to before 14.0 takes:"
            " devPtr, count, location, flags, stream",
            "cudaMemPrefetchAsync", **PREFETCH, dstDevise=0,
        )  # fmt: skip
        refuses(
            TypeError, "cudaGetLastError has no parameter 'x'; 11.0 and later takes: nothing",
            "cudaGetLastError", x=1,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "kind", "text"),
        [
            ({"count": 1.5}, TypeError, "(count)=1.5 is no integer, which size_t needs"),
            ({"count": -1}, ValueError, "(count)=-1 does not fit into size_t"),
            ({"count": 2**64}, ValueError, f"(count)={2**64} does not fit into size_t"),
            ({"count": "many"}, ValueError,
             "(count)='many' is no constant of the registry; give its number"),
            ({"devPtr": -1}, ValueError, "(devPtr)=-1 is no address: it must be in [0, 2**64)"),
            ({"devPtr": "abc"}, TypeError,
             "(devPtr)='abc' is no address; give an int, None, an array, a tensor, a stream or an"
             " event"),
            ({"location": 3}, TypeError,
             "(location)=3 is no struct cudaMemLocation; give a dict or a tuple of type, id"),
            ({"location": (1, 2, 3)}, ValueError,
             "(location) has 3 values; struct cudaMemLocation has 2: type, id"),
            ({"location": {"kind": 1}}, ValueError,
             "(location) has no field 'kind'; struct cudaMemLocation has type, id"),
            ({"location": (1, 2**31)}, ValueError,
             f"(location).id={2**31} does not fit into int"),
            ({"location": {"type": "cudaMemLocationTypeMoon"}}, ValueError,
             "(location).type='cudaMemLocationTypeMoon' is no constant of cudaMemLocationType in"
             " the registry; give its number"),
            ({"location": ("cudaMemcpyDefault", 0)}, ValueError,
             "(location).type='cudaMemcpyDefault' is no constant of cudaMemLocationType in the"
             " registry; give its number"),
        ],
    )  # fmt: skip
    def test_wrong_types_ranges_and_structs(self, change, kind, text):
        refuses(kind, "cudaMemPrefetchAsync" + text, "cudaMemPrefetchAsync",
                **{**PREFETCH, **change})  # fmt: skip

    @pytest.mark.parametrize("text", ["1.5", "64", "0x40", "1e3", "-1", "nan", "1_000", " 7 "])
    def test_a_number_as_text(self, text):
        refuses(
            TypeError,
            f"cudaMemPrefetchAsync(count)={text!r} is text; give size_t as a number, not as text",
            "cudaMemPrefetchAsync", **{**PREFETCH, "count": text},
        )  # fmt: skip

    @pytest.mark.known_failure("strided-array")
    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    @pytest.mark.parametrize(
        ("cut", "shape", "strides"),
        [
            (lambda a: a[::2], (4, 8), (128, 8)), (lambda a: a[:, ::2], (8, 4), (64, 16)),
            (lambda a: a[:, :4], (8, 4), (64, 8)), (lambda a: a[:, 3], (8,), (64,)),
            (lambda a: a.T[:2], (2, 8), (8, 64)), (lambda a: a[::4, 1:2], (2, 1), (256, 8)),
        ],
    )  # fmt: skip
    def test_arrays_with_gaps(self, kind, cut, shape, strides):
        """CUDA would take the bytes behind the first element, which are others."""
        whole = np.zeros((8, 8), np.int64)
        part = cut(torch.from_numpy(whole) if kind == "torch" else whole)
        for name, other in (("dst", "src"), ("src", "dst")):
            refuses(
                ValueError,
                f"cudaMemcpyAsync({name}) is an array of shape {shape} with strides of {strides}"
                " bytes, which is not one block of memory: CUDA would take other bytes. Give a"
                " contiguous copy of it, or its address as an int",
                "cudaMemcpyAsync", **{name: part, other: whole}, count=32, stream=2,
            )  # fmt: skip

    @pytest.mark.parametrize("name", ["numpy", "expanded", "backwards"])
    def test_other_arrays_that_are_no_block(self, name):
        one = {
            "numpy": np.broadcast_to(np.zeros(1), (4,)), "backwards": np.zeros(4)[::-1],
            "expanded": torch.zeros(1).expand(4),
        }[name]  # fmt: skip
        with pytest.raises(ValueError, match="which is not one block of memory"):
            kvsig.call("cudaMemcpyAsync", dst=one, src=1, count=8, kind=4, stream=2)

    def test_not_bound(self):
        refuses(
            _core.BindError,
            "cudaMemcpyWithAttributesAsync is not bound: 13.0 is older than 13.2",
            "cudaMemcpyWithAttributesAsync", dst=1, src=1, size=1, attr=None, stream=2,
        )  # fmt: skip


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12).reshape(3, 4), np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.arange(24).reshape(4, 6)[1:3], np.arange(12).reshape(3, 4).T, np.array(5),
        np.arange(4)[1:2], np.zeros((4, 0)), np.zeros((2, 3), [("a", "i2"), ("b", "f8")]),
        torch.arange(12).view(3, 4).t(), torch.zeros(2, 3, 4, 5).to(
            memory_format=torch.channels_last), torch.tensor(3), torch.zeros(4, 1)[:, :1],
        torch.zeros(5, 1, 3).transpose(0, 1), torch.zeros(0, 7),
    ],
    ids=lambda a: f"{type(a).__name__}-{tuple(a.shape)}",
)  # fmt: skip
def test_arrays_that_are_one_block_stand_for_their_address(bind, array):
    control = bind("13.0")
    control.stub()
    control.record()
    kvsig.call("cudaMemcpyAsync", dst=array, src=1, count=8, kind=4, stream=2)
    address = array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data
    assert control.calls()[0]["arguments"][0]["value"] == address


@pytest.mark.parametrize("first", ["import kvsig.call", "from kvsig.call import call", "pass"])
def test_the_public_name_is_callable_whatever_was_imported_first(first):
    done = subprocess.run(
        [sys.executable, "-c",
         f"{first}\nimport kvsig\nprint(kvsig.call('cudaRuntimeGetVersion'))"],
        env={**os.environ, "KVSIG_CUDART": "emulated:12.9"}, capture_output=True, text=True,
        cwd=os.path.dirname(os.path.dirname(kvsig.__file__)),
    )  # fmt: skip
    assert done.stdout == "12090\n", done.stderr


def test_newer_than_every_range_is_not_bound(bind):
    with pytest.warns(RuntimeWarning, match="newer than every prototype"):
        bind(NEXT_TEXT)
    refuses(
        _core.BindError,
        f"cudaMemAdvise is not bound: {NEXT_TEXT} is newer than every range; the last is"
        f" {last('cudaMemAdvise')}",
        "cudaMemAdvise", **ADVISE,
    )  # fmt: skip
