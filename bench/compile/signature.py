"""What Triton's JIT would compile for given arguments, with no GPU."""

import torch

TYPE_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


def signature(kernel, args, constants):
    """ASTSource arguments as the JIT would specialise them: 1 is a constant, multiples of 16 are marked."""
    types, constexprs, attrs = {}, dict(constants), {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            types[name] = "*" + TYPE_NAMES[value.dtype]
            if not kernel.params[index].do_not_specialize_on_alignment:
                attrs[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        elif isinstance(value, int):
            types[name] = "i32"
            plain = kernel.params[index].do_not_specialize
            if value == 1 and not plain:
                types[name] = "constexpr"
                constexprs[name] = 1
            elif value % 16 == 0 and not plain:
                attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            types[name] = f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
    types.update(dict.fromkeys(constants, "constexpr"))
    return {name: types[name] for name in kernel.arg_names}, constexprs, attrs
