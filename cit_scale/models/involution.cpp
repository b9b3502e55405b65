// Involution on a CPU: the sum itself and its gradients with respect to x and to the kernel. Built by
// involution_cpu.py; the formula and its letters are in involution.py.
//
// A row of an operand is first copied into scratch: widened to the type of the sums, padded with zeros, and with 16
// channels of one group side by side, the lanes of a vector. The loops that compute therefore know nothing of dtypes,
// memory formats, strides, borders, or groups that are no multiple of 16 channels. Of x (or of its gradient) scratch
// holds K rows, those that meet one row of the output; they are a ring, so that each row is copied once.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

using index_t = std::int64_t;

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// ---------------------------------------------------------------------------------------------------------------------
// What Python passes: the ctypes structures of involution_cpu.py, with their fields.

struct Shape {
    index_t batch, groups, group_channels, kernel_size, stride, height, width, out_height, out_width;
};

// (B, C, H, W), steps in elements.
struct Image {
    void* data;
    index_t batch_step, channel_step, row_step, column_step;
};

// (B, G, K, K, H', W'), steps in elements.
struct Kernel {
    void* data;
    index_t batch_step, group_step, u_step, v_step, row_step, column_step;
};

// torch's own loop over its own threads (torch_parallel_for of its stable C interface); 0 is success.
using ParallelFor = std::int32_t (*)(index_t, index_t, index_t, void (*)(index_t, index_t, void*), void*);

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

struct BFloat16 {
    std::uint16_t bits;
};

INLINE float widen(float value) { return value; }
INLINE double widen(double value) { return value; }
INLINE float widen(BFloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

INLINE void narrow(float value, float& to) { to = value; }
INLINE void narrow(double value, double& to) { to = value; }
INLINE void narrow(float value, BFloat16& to) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const std::uint32_t quiet_nan = (bits >> 16) | 0x40;
    to.bits = static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : nearest_even);
}

constexpr int LANES = 16;  // channels of a group in the published networks; one AVX-512 register of float32
constexpr int HALF = 8;

template <class A>
struct VectorOf {
    typedef A whole __attribute__((vector_size(LANES * sizeof(A))));
    typedef A half __attribute__((vector_size(HALF * sizeof(A))));
    typedef std::conditional_t<sizeof(A) == 4, std::int32_t, std::int64_t> lane;
    typedef lane lanes __attribute__((vector_size(HALF * sizeof(A))));
};
template <class A>
using Whole = typename VectorOf<A>::whole;
template <class A>
using Half = typename VectorOf<A>::half;

template <class V, class A>
INLINE V load(const A* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class V, class A>
INLINE void store(const V& value, A* to) {
    std::memcpy(to, &value, sizeof value);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (typename VectorOf<A>::lanes){__VA_ARGS__})
#endif

// Sums of neighbouring lanes, of a and of b, within each half of the register.
template <class A>
INLINE Half<A> add_pairs(Half<A> a, Half<A> b) {
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

// Lane n of the result is the sum of the lanes of terms[n].
template <class A>
INLINE Half<A> sum_each(const Half<A> (&terms)[HALF]) {
    const Half<A> a = add_pairs<A>(add_pairs<A>(terms[0], terms[1]), add_pairs<A>(terms[2], terms[3]));
    const Half<A> b = add_pairs<A>(add_pairs<A>(terms[4], terms[5]), add_pairs<A>(terms[6], terms[7]));
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

// f(0), f(1), ... f(N - 1), where each argument is a constant.
template <class F, int... I>
INLINE void unrolled(F&& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
INLINE void unrolled(F&& f) {
    unrolled(f, std::make_integer_sequence<int, N>{});
}

// ---------------------------------------------------------------------------------------------------------------------
// Scratch

// Aligned memory, zero at first.
template <class A>
class Scratch {
 public:
    explicit Scratch(index_t size) : data_(new (std::align_val_t(64)) A[size]()) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { ::operator delete[](data_, std::align_val_t(64)); }
    A* data() { return data_; }

 private:
    A* data_;
};

// A range of groups [first, last) of one call.
struct Groups {
    index_t first, last;
    index_t count() const { return last - first; }
};

index_t blocks_per_group(const Shape& shape) { return (shape.group_channels + LANES - 1) / LANES; }
index_t taps(const Shape& shape) { return shape.kernel_size * shape.kernel_size; }
index_t padding(const Shape& shape) { return shape.kernel_size / 2; }
index_t padded_width(const Shape& shape) { return shape.width + 2 * padding(shape); }

// Of the K rows of x that row i of the output meets, those that are not padding.
struct Rows {
    index_t begin, end;
};

// The row of x that u = 0 meets; above the image it is negative.
index_t top_row(const Shape& shape, index_t i) { return shape.stride * i - padding(shape); }

Rows rows_inside(const Shape& shape, index_t i) {
    const index_t top = top_row(shape, i);
    return {std::max<index_t>(0, -top), std::min(shape.kernel_size, shape.height - top)};
}

// Visits a row of an image beside the row in scratch that it belongs to: f(element of the image, element of scratch).
// Scratch: [block of 16 channels][columns_there][16], the row beginning at its column `left`.
template <class T, class A, class F>
void for_row(const Shape& shape, const Image& image, index_t b, index_t row, index_t columns, Groups groups, A* scratch,
             index_t columns_there, index_t left, F&& f) {
    T* begin = static_cast<T*>(image.data) + b * image.batch_step + row * image.row_step +
               groups.first * shape.group_channels * image.channel_step;
    const index_t channels = groups.count() * shape.group_channels;
    A* here = scratch + left * LANES;
    if (image.channel_step == 1 && shape.group_channels % LANES == 0) {
        for (index_t column = 0; column < columns; ++column) {
            for (index_t block = 0; block < channels / LANES; ++block) {
                T* __restrict from = begin + column * image.column_step + block * LANES;
                A* __restrict to = here + (block * columns_there + column) * LANES;
                for (int lane = 0; lane < LANES; ++lane) f(from[lane], to[lane]);
            }
        }
        return;
    }
    for (index_t channel = 0; channel < channels; ++channel) {
        const index_t g = channel / shape.group_channels, in_group = channel % shape.group_channels;
        const index_t block = g * blocks_per_group(shape) + in_group / LANES;
        T* from = begin + channel * image.channel_step;
        A* to = here + block * columns_there * LANES + in_group % LANES;
        for (index_t column = 0; column < columns; ++column) f(from[column * image.column_step], to[column * LANES]);
    }
}

// Visits the kernels of positions j .. j + count of an output row beside their place in scratch: [group][count][K * K].
template <class T, class A, class F>
void for_kernels(const Shape& shape, const Kernel& kernel, index_t b, index_t row, index_t j, index_t count,
                 Groups groups, A* scratch, F&& f) {
    T* begin = static_cast<T*>(kernel.data) + b * kernel.batch_step + groups.first * kernel.group_step +
               row * kernel.row_step + j * kernel.column_step;
    const index_t size = shape.kernel_size, taps = size * size;
    if (kernel.v_step == 1 && kernel.u_step == size) {
        for (index_t jj = 0; jj < count; ++jj) {
            for (index_t g = 0; g < groups.count(); ++g) {
                T* __restrict from = begin + jj * kernel.column_step + g * kernel.group_step;
                A* __restrict to = scratch + (g * count + jj) * taps;
                // The next block's, so that they arrive while this one is computed: saves a fifth of the time at K = 7.
                for (index_t tap = 0; tap < taps; tap += 64 / index_t{sizeof(T)}) {
                    __builtin_prefetch(from + count * kernel.column_step + tap, 0, 2);
                }
                for (index_t tap = 0; tap < taps; ++tap) f(from[tap], to[tap]);
            }
        }
        return;
    }
    for (index_t g = 0; g < groups.count(); ++g) {
        for (index_t tap = 0; tap < taps; ++tap) {
            T* from = begin + g * kernel.group_step + tap / size * kernel.u_step + tap % size * kernel.v_step;
            A* to = scratch + g * count * taps + tap;
            for (index_t jj = 0; jj < count; ++jj) f(from[jj * kernel.column_step], to[jj * taps]);
        }
    }
}

const auto read = [](auto& there, auto& here) INLINE_LAMBDA { here = widen(there); };
const auto write = [](auto& there, auto& here) INLINE_LAMBDA { narrow(here, there); };

// Where in scratch the K rows lie that a row of the output meets. Only those inside are set.
template <class A>
struct TapRows {
    A* const* rows;
    Rows inside;
};

// The rows of an image that meet one row of the output, at most K: [row modulo K][block of 16 channels][W + 2P][16].
template <class A>
class Ring {
 public:
    Ring(const Shape& shape, Groups groups)
        : shape_(shape),
          groups_(groups),
          row_size_(groups.count() * blocks_per_group(shape) * padded_width(shape) * LANES),
          scratch_(shape.kernel_size * row_size_),
          rows_(new A*[shape.kernel_size]) {}

    TapRows<A> rows_for(index_t i) {
        const Rows inside = rows_inside(shape_, i);
        for (index_t u = inside.begin; u < inside.end; ++u) rows_[u] = row(top_row(shape_, i) + u);
        return {rows_.get(), inside};
    }

    // In each of these rows, the offset of the first column that position j meets, for a block of 16 channels.
    index_t offset(index_t j, index_t block) const {
        return (block * padded_width(shape_) + shape_.stride * j) * LANES;
    }

    // Bring in the rows that output row i of image b meets and that are not here yet. i rises within an image.
    template <class T>
    void advance(const Image& image, index_t b, index_t i) {
        if (b != image_) end_ = 0;
        const Rows inside = rows_inside(shape_, i);
        const index_t end = top_row(shape_, i) + inside.end;
        for (index_t y = std::max(end_, top_row(shape_, i) + inside.begin); y < end; ++y) {
            for_row<T>(shape_, image, b, y, shape_.width, groups_, row(y), padded_width(shape_), padding(shape_), read);
        }
        image_ = b;
        end_ = end;
    }

    // Hand out the rows of image b before `end` that are still here, and clear their place.
    template <class T>
    void retire(const Image& image, index_t b, index_t end) {
        for (; end_ < end; ++end_) {
            A* here = row(end_);
            for_row<T>(shape_, image, b, end_, shape_.width, groups_, here, padded_width(shape_), padding(shape_),
                       write);
            std::fill(here, here + row_size_, A{0});
        }
    }

 private:
    A* row(index_t y) { return scratch_.data() + y % shape_.kernel_size * row_size_; }

    const Shape& shape_;
    const Groups groups_;
    const index_t row_size_;
    Scratch<A> scratch_;
    std::unique_ptr<A*[]> rows_;
    index_t image_ = -1;
    index_t end_ = 0;  // the first row that has not been brought in, or not been handed out
};

// ---------------------------------------------------------------------------------------------------------------------
// What computes: J positions side by side of one block of 16 channels. K = 0: kernel_size is known at run time only.

// Positions that are worked on at once; each keeps an accumulator in a register, or two with 256-bit registers.
#if defined(__AVX512F__)
constexpr int WIDEST = 8;
#else
constexpr int WIDEST = 4;
#endif

// offset: in each row of x, the first column that the first position meets. kernels: [J][K * K]. out: [J][16].
template <class A, int K, int S, int J>
void sum_taps(const TapRows<A>& x, index_t offset, const A* kernels, index_t kernel_size, A* out) {
    const index_t size = K > 0 ? K : kernel_size, taps = size * size;
    Whole<A> sums[J] = {};
    for (index_t u = x.inside.begin; u < x.inside.end; ++u) {
        const A* row = x.rows[u] + offset;
        const A* kernel = kernels + u * size;
        if constexpr (K > 0) {
            unrolled<S*(J - 1) + K>([&](auto column) INLINE_LAMBDA {
                const auto value = load<Whole<A>>(row + column * LANES);
                unrolled<J>([&](auto j) INLINE_LAMBDA {
                    constexpr int v = column - S * j;
                    if constexpr (v >= 0 && v < K) sums[j] += kernel[j * taps + v] * value;
                });
            });
        } else {
            for (index_t v = 0; v < size; ++v) {
                unrolled<J>([&](auto j) INLINE_LAMBDA {
                    sums[j] += kernel[j * taps + v] * load<Whole<A>>(row + (S * j + v) * LANES);
                });
            }
        }
    }
    unrolled<J>([&](auto j) INLINE_LAMBDA { store(sums[j], out + j * LANES); });
}

// The other way: each position's gradient, times its kernel, is added to all of x that it had met.
template <class A, int K, int S, int J>
void spread_taps(const TapRows<A>& x, index_t offset, const A* kernels, index_t kernel_size, A* grad_out) {
    const index_t size = K > 0 ? K : kernel_size, taps = size * size;
    Whole<A> grads[J];
    unrolled<J>([&](auto j) INLINE_LAMBDA { grads[j] = load<Whole<A>>(grad_out + j * LANES); });
    for (index_t u = x.inside.begin; u < x.inside.end; ++u) {
        A* row = x.rows[u] + offset;
        const A* kernel = kernels + u * size;
        if constexpr (K > 0) {
            unrolled<S*(J - 1) + K>([&](auto column) INLINE_LAMBDA {
                auto sum = load<Whole<A>>(row + column * LANES);
                unrolled<J>([&](auto j) INLINE_LAMBDA {
                    constexpr int v = column - S * j;
                    if constexpr (v >= 0 && v < K) sum += kernel[j * taps + v] * grads[j];
                });
                store(sum, row + column * LANES);
            });
        } else {
            for (index_t v = 0; v < size; ++v) {
                unrolled<J>([&](auto j) INLINE_LAMBDA {
                    A* column = row + (S * j + v) * LANES;
                    store(load<Whole<A>>(column) + kernel[j * taps + v] * grads[j], column);
                });
            }
        }
    }
}

// One position: the K * K products of its gradient with x, each summed over the channels. Added to what is there,
// unless this is the group's first block. Padding gives 0.
template <class A, int K>
void dot_taps(const TapRows<A>& x, index_t offset, const A* grad_out, index_t kernel_size, bool is_first, A* out) {
    const index_t size = K > 0 ? K : kernel_size, taps = size * size;
    const auto low = load<Half<A>>(grad_out), high = load<Half<A>>(grad_out + HALF);
    if (is_first) {
        std::fill(out, out + x.inside.begin * size, A{0});
        std::fill(out + x.inside.end * size, out + taps, A{0});
    }
    for (index_t u = x.inside.begin; u < x.inside.end; ++u) {
        for (index_t v = 0; v < size; v += HALF) {
            const A* row = x.rows[u] + offset + v * LANES;
            Half<A> terms[HALF] = {};
            unrolled<HALF>([&](auto n) INLINE_LAMBDA {
                if (K > 0 ? n < K : v + n < size) {
                    terms[n] = low * load<Half<A>>(row + n * LANES) + high * load<Half<A>>(row + n * LANES + HALF);
                }
            });
            const auto sums = sum_each<A>(terms);
            A* tap = out + u * size + v;
            if (is_first && u * size + v + HALF <= taps) {
                store(sums, tap);  // lanes beyond this row of taps hold 0, and the next row overwrites them
            } else {
                const index_t count = std::min<index_t>(HALF, size - v);
                for (index_t n = 0; n < count; ++n) tap[n] = is_first ? sums[n] : tap[n] + sums[n];
            }
        }
    }
}

// The functions above, compiled for one kind of involution; sum and spread for each J = 1 .. WIDEST.
template <class A>
struct TapLoops {
    void (*sum[WIDEST])(const TapRows<A>&, index_t, const A*, index_t, A*);
    void (*spread[WIDEST])(const TapRows<A>&, index_t, const A*, index_t, A*);
    void (*dot)(const TapRows<A>&, index_t, const A*, index_t, bool, A*);
};

template <class A, int K, int S, int... J>
constexpr TapLoops<A> make_loops(std::integer_sequence<int, J...>) {
    return {{sum_taps<A, K, S, J + 1>...}, {spread_taps<A, K, S, J + 1>...}, dot_taps<A, K>};
}

template <class A, int K, int S>
constexpr TapLoops<A> loops_of = make_loops<A, K, S>(std::make_integer_sequence<int, WIDEST>{});

// RedNet's kernel sizes have code of their own where sums are in float32; all others share one.
template <class A>
const TapLoops<A>& choose_loops(const Shape& shape) {
    const bool strided = shape.stride == 2;
    if constexpr (std::is_same_v<A, float>) {
        if (shape.kernel_size == 7) return strided ? loops_of<A, 7, 2> : loops_of<A, 7, 1>;
        if (shape.kernel_size == 3) return strided ? loops_of<A, 3, 2> : loops_of<A, 3, 1>;
    }
    return strided ? loops_of<A, 0, 2> : loops_of<A, 0, 1>;
}

// ---------------------------------------------------------------------------------------------------------------------
// Loops over rows

// f(first position, count) over a row cut into blocks of nearly one size, at most WIDEST.
template <class F>
void for_blocks(index_t width, F&& f) {
    const index_t blocks = (width + WIDEST - 1) / WIDEST;
    for (index_t block = 0; block < blocks; ++block) {
        const index_t begin = block * width / blocks, end = (block + 1) * width / blocks;
        f(begin, end - begin);
    }
}

// f(begin, end) over ranges that together are 0 .. count, on torch's threads. cost: multiplications per item.
template <class F>
std::int32_t parallel(ParallelFor parallel_for, index_t count, index_t cost, const F& f) {
    const index_t grain = 1 + (1 << 16) / (cost + 1);
    const auto call = [](index_t begin, index_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
    return parallel_for(0, count, grain, call, const_cast<F*>(&f));
}

index_t row_cost(const Shape& shape, index_t groups) {
    return shape.out_width * taps(shape) * groups * shape.group_channels;
}

template <class T, class A>
std::int32_t forward(const Shape& shape, const Image& x, const Kernel& kernel, const Image& out,
                     ParallelFor parallel_for) {
    const Groups all{0, shape.groups};
    const index_t blocks = blocks_per_group(shape), width = shape.out_width;
    const TapLoops<A>& loops = choose_loops<A>(shape);
    const auto rows = [&](index_t begin, index_t end) {
        Ring<A> ring(shape, all);
        Scratch<A> kernels(WIDEST * shape.groups * taps(shape)), sums(shape.groups * blocks * width * LANES);
        for (index_t row = begin; row < end; ++row) {
            const index_t b = row / shape.out_height, i = row % shape.out_height;
            ring.template advance<T>(x, b, i);
            const TapRows<A> x_rows = ring.rows_for(i);
            for_blocks(width, [&](index_t j, index_t count) {
                for_kernels<const T>(shape, kernel, b, i, j, count, all, kernels.data(), read);
                for (index_t block = 0; block < shape.groups * blocks; ++block) {
                    loops.sum[count - 1](x_rows, ring.offset(j, block),
                                         kernels.data() + block / blocks * count * taps(shape), shape.kernel_size,
                                         sums.data() + (block * width + j) * LANES);
                }
            });
            for_row<T>(shape, out, b, i, width, all, sums.data(), width, 0, write);
        }
    };
    return parallel(parallel_for, shape.batch * shape.out_height, row_cost(shape, shape.groups), rows);
}

// Neighbouring rows of the output add to the same rows of x, so threads share out groups and not rows.
template <class T, class A>
std::int32_t grad_x(const Shape& shape, const Image& grad_out, const Kernel& kernel, const Image& grad,
                    ParallelFor parallel_for) {
    const index_t blocks = blocks_per_group(shape), width = shape.out_width;
    const TapLoops<A>& loops = choose_loops<A>(shape);
    const auto spread_image = [&](index_t b, Groups groups) {
        Ring<A> ring(shape, groups);
        Scratch<A> kernels(WIDEST * groups.count() * taps(shape)), grads(groups.count() * blocks * width * LANES);
        for (index_t i = 0; i < shape.out_height; ++i) {
            for_row<T>(shape, grad_out, b, i, width, groups, grads.data(), width, 0, read);
            const TapRows<A> x_rows = ring.rows_for(i);
            for_blocks(width, [&](index_t j, index_t count) {
                for_kernels<const T>(shape, kernel, b, i, j, count, groups, kernels.data(), read);
                for (index_t block = 0; block < groups.count() * blocks; ++block) {
                    loops.spread[count - 1](x_rows, ring.offset(j, block),
                                            kernels.data() + block / blocks * count * taps(shape), shape.kernel_size,
                                            grads.data() + (block * width + j) * LANES);
                }
            });
            ring.template retire<T>(grad, b, i + 1 < shape.out_height ? top_row(shape, i + 1) : shape.height);
        }
    };
    const auto groups_of_images = [&](index_t begin, index_t end) {
        while (begin < end) {
            const index_t b = begin / shape.groups, first = begin % shape.groups;
            const index_t count = std::min(shape.groups - first, end - begin);
            spread_image(b, {first, first + count});
            begin += count;
        }
    };
    return parallel(parallel_for, shape.batch * shape.groups, shape.out_height * row_cost(shape, 1), groups_of_images);
}

template <class T, class A>
std::int32_t grad_kernel(const Shape& shape, const Image& grad_out, const Image& x, const Kernel& grad,
                         ParallelFor parallel_for) {
    const Groups all{0, shape.groups};
    const index_t blocks = blocks_per_group(shape), width = shape.out_width;
    const TapLoops<A>& loops = choose_loops<A>(shape);
    const auto rows = [&](index_t begin, index_t end) {
        Ring<A> ring(shape, all);
        Scratch<A> sums(WIDEST * shape.groups * taps(shape)), grads(shape.groups * blocks * width * LANES);
        for (index_t row = begin; row < end; ++row) {
            const index_t b = row / shape.out_height, i = row % shape.out_height;
            ring.template advance<T>(x, b, i);
            for_row<T>(shape, grad_out, b, i, width, all, grads.data(), width, 0, read);
            const TapRows<A> x_rows = ring.rows_for(i);
            for_blocks(width, [&](index_t j, index_t count) {
                for (index_t block = 0; block < shape.groups * blocks; ++block) {
                    for (index_t jj = 0; jj < count; ++jj) {
                        loops.dot(x_rows, ring.offset(j + jj, block), grads.data() + (block * width + j + jj) * LANES,
                                  shape.kernel_size, block % blocks == 0,
                                  sums.data() + (block / blocks * count + jj) * taps(shape));
                    }
                }
                for_kernels<T>(shape, grad, b, i, j, count, all, sums.data(), write);
            });
        }
    };
    return parallel(parallel_for, shape.batch * shape.out_height, row_cost(shape, shape.groups), rows);
}

// f(T, A): the type of the tensors and that of the sums. dtype: 0 float32, 1 float64, 2 bfloat16.
template <class F>
std::int32_t with_types(int dtype, F&& f) {
    switch (dtype) {
        case 0:
            return f(float{}, float{});
        case 1:
            return f(double{}, double{});
        default:
            return f(BFloat16{}, float{});
    }
}

}  // namespace

// Each returns 0, or what torch's parallel loop returned.
extern "C" {

std::int32_t involution_forward(int dtype, const Shape* shape, const Image* x, const Kernel* kernel, const Image* out,
                                ParallelFor parallel_for) {
    return with_types(dtype, [&](auto t, auto a) {
        return forward<decltype(t), decltype(a)>(*shape, *x, *kernel, *out, parallel_for);
    });
}

std::int32_t involution_grad_x(int dtype, const Shape* shape, const Image* grad_out, const Kernel* kernel,
                               const Image* grad, ParallelFor parallel_for) {
    return with_types(dtype, [&](auto t, auto a) {
        return grad_x<decltype(t), decltype(a)>(*shape, *grad_out, *kernel, *grad, parallel_for);
    });
}

std::int32_t involution_grad_kernel(int dtype, const Shape* shape, const Image* grad_out, const Image* x,
                                    const Kernel* grad, ParallelFor parallel_for) {
    return with_types(dtype, [&](auto t, auto a) {
        return grad_kernel<decltype(t), decltype(a)>(*shape, *grad_out, *x, *grad, parallel_for);
    });
}
}
