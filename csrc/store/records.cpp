// Records of a candidate store, planar, decoded many at a time: docs/store_format.md has the bytes.
//
// What is read is not trusted. Every size follows from a record's own counts and is compared with
// the record's length before anything is made of it; a record that breaks a rule is named, and
// megatron_replay/store/format.py, which is the definition, says what is wrong with it.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace py = pybind11;

namespace {

// A buffer that stays alive and in place until the end of the call.
class View {
  public:
    explicit View(PyObject* object) {
        if (PyObject_GetBuffer(object, &buffer_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    }
    View(View&& other) noexcept : buffer_(other.buffer_) { other.buffer_.obj = nullptr; }
    View(const View&) = delete;
    View& operator=(const View&) = delete;
    ~View() { PyBuffer_Release(&buffer_); }
    const uint8_t* data() const { return static_cast<const uint8_t*>(buffer_.buf); }
    int64_t size() const { return buffer_.len; }

  private:
    Py_buffer buffer_{};
};

template <typename T>
T load(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

constexpr int64_t kCountBytes = 4;
constexpr int64_t kBytesPerPosition = 4 + 1 + 3 * 2;

struct Rules {
    int64_t vocab_size;
    int high_bits;     // 0, 1, 2, 4 or 8 bits of an id above its low 16
    int logits_bytes;  // 0 or 2
};

struct Sizes {
    int64_t positions = 0, ids = 0;
};

// Counts of a record, or false where they do not fit its length.
bool measure(const View& record, const Rules& rules, Sizes& sizes) {
    if (record.size() < kCountBytes) return false;
    sizes.positions = load<uint32_t>(record.data());
    if (sizes.positions > (record.size() - kCountBytes) / kBytesPerPosition) return false;
    const uint8_t* less_one = record.data() + kCountBytes + 4 * sizes.positions;
    int64_t ids = sizes.positions;
    for (int64_t p = 0; p < sizes.positions; ++p) ids += less_one[p];
    sizes.ids = ids;
    return record.size() == kCountBytes + kBytesPerPosition * sizes.positions + 2 * ids +
                                (ids * rules.high_bits + 7) / 8 + rules.logits_bytes * ids;
}

// id i = low[i] + (field i of the high plane << 16)
template <int kBits>
void join_planes(const uint8_t* low, const uint8_t* high, int64_t count, int32_t* ids) {
    if constexpr (kBits == 0) {
        for (int64_t i = 0; i < count; ++i) ids[i] = load<uint16_t>(low + 2 * i);
    } else {
        constexpr int kFields = 8 / kBits, kMask = (1 << kBits) - 1;
        const int64_t whole = count / kFields;
        for (int64_t byte = 0; byte < whole; ++byte)
            for (int field = 0; field < kFields; ++field) {
                const int64_t i = byte * kFields + field;
                ids[i] = load<uint16_t>(low + 2 * i) |
                         ((high[byte] >> (field * kBits) & kMask) << 16);
            }
        for (int64_t i = whole * kFields; i < count; ++i)
            ids[i] = load<uint16_t>(low + 2 * i) |
                     ((high[whole] >> (i % kFields * kBits) & kMask) << 16);
    }
}

void join_planes(int bits, const uint8_t* low, const uint8_t* high, int64_t count, int32_t* ids) {
    switch (bits) {
        case 0: return join_planes<0>(low, high, count, ids);
        case 1: return join_planes<1>(low, high, count, ids);
        case 2: return join_planes<2>(low, high, count, ids);
        case 4: return join_planes<4>(low, high, count, ids);
        default: return join_planes<8>(low, high, count, ids);
    }
}

bool padding_is_zero(int bits, const uint8_t* high, int64_t count) {
    const int64_t used = count * bits % 8;
    return used == 0 || high[count * bits / 8] >> used == 0;
}

// Ids ascend in every set: as often as an id is not above the one before it, a set begins there.
bool ascend(const int32_t* ids, int64_t count, const int64_t* offsets, int64_t positions) {
    int64_t falls = 0, falls_between = 0;
    for (int64_t i = 1; i < count; ++i) falls += ids[i] <= ids[i - 1];
    for (int64_t p = 1; p < positions; ++p) {
        const int64_t start = offsets[p] - offsets[0];
        falls_between += ids[start] <= ids[start - 1];
    }
    return falls == falls_between;
}

struct Outputs {
    int32_t* positions;
    int64_t* offsets;  // of the record's first position; holds where its ids start
    uint16_t* halves;  // [3, P]: lse, label_logprob, tail_mass
    int64_t total_positions;
    int32_t* ids;
    uint16_t* logits;
};

// False where the record breaks a rule. `out` points at the record's share of every array.
bool decode(const View& record, const Rules& rules, const Sizes& sizes, const Outputs& out) {
    const uint8_t* cursor = record.data() + kCountBytes;
    std::memcpy(out.positions, cursor, 4 * sizes.positions);
    cursor += 4 * sizes.positions;
    for (int64_t p = 0; p < sizes.positions; ++p) out.offsets[p + 1] = out.offsets[p] + cursor[p] + 1;
    cursor += sizes.positions;
    for (int column = 0; column < 3; ++column) {
        std::memcpy(out.halves + column * out.total_positions, cursor, 2 * sizes.positions);
        cursor += 2 * sizes.positions;
    }
    const uint8_t* high = cursor + 2 * sizes.ids;
    join_planes(rules.high_bits, cursor, high, sizes.ids, out.ids);
    if (!padding_is_zero(rules.high_bits, high, sizes.ids)) return false;
    if (rules.logits_bytes)
        std::memcpy(out.logits, high + (sizes.ids * rules.high_bits + 7) / 8, 2 * sizes.ids);

    int32_t before = -1;
    for (int64_t p = 0; p < sizes.positions; ++p) {
        if (out.positions[p] <= before) return false;
        before = out.positions[p];
        // Ids ascend, so the last of a set bounds it; none is negative, having 24 bits.
        if (out.ids[out.offsets[p + 1] - out.offsets[0] - 1] >= rules.vocab_size) return false;
    }
    return ascend(out.ids, sizes.ids, out.offsets, sizes.positions);
}

template <typename T>
py::array_t<T> array_of(int64_t count) {
    return py::array_t<T>(static_cast<py::ssize_t>(count));
}

py::object decode_records(const py::sequence& records, int64_t vocab_size, int high_bits,
                          bool has_logits) {
    const Rules rules{vocab_size, high_bits, has_logits ? 2 : 0};
    std::vector<View> views;
    views.reserve(records.size());
    for (py::handle record : records) views.emplace_back(record.ptr());
    const int64_t count = static_cast<int64_t>(views.size());

    auto document_offsets = array_of<int64_t>(count + 1);
    std::vector<Sizes> sizes(count);
    std::vector<int64_t> first_id(count);
    Sizes total;
    int64_t* starts = document_offsets.mutable_data();
    for (int64_t d = 0; d < count; ++d) {
        if (!measure(views[d], rules, sizes[d])) return py::int_(d);
        starts[d] = total.positions;
        first_id[d] = total.ids;
        total.positions += sizes[d].positions;
        total.ids += sizes[d].ids;
    }
    starts[count] = total.positions;

    auto positions = array_of<int32_t>(total.positions);
    auto offsets = array_of<int64_t>(total.positions + 1);
    auto halves = array_of<uint16_t>(3 * total.positions);
    auto ids = array_of<int32_t>(total.ids);
    auto logits = array_of<uint16_t>(has_logits ? total.ids : 0);
    const Outputs all{positions.mutable_data(), offsets.mutable_data(), halves.mutable_data(),
                      total.positions,          ids.mutable_data(),     logits.mutable_data()};
    all.offsets[0] = 0;
    int64_t bad = -1;
    {
        py::gil_scoped_release release;
        for (int64_t d = 0; d < count && bad < 0; ++d) {
            const int64_t p = starts[d], i = first_id[d];
            const Outputs out{all.positions + p, all.offsets + p, all.halves + p,
                              total.positions,   all.ids + i,     all.logits + (has_logits ? i : 0)};
            if (!decode(views[d], rules, sizes[d], out)) bad = d;
        }
    }
    if (bad >= 0) return py::int_(bad);
    return py::make_tuple(document_offsets, positions, offsets, halves, ids, logits);
}

// Crcs are polynomials over bits modulo the one of zlib, least power in the highest bit: times x is
// a shift to the right.
constexpr uint32_t kPolynomial = 0xEDB88320u, kOne = 1u << 31;

uint32_t times_x(uint32_t a) { return a & 1 ? a >> 1 ^ kPolynomial : a >> 1; }

uint32_t product(uint32_t a, uint32_t b) {
    uint32_t sum = 0;
    for (uint32_t power = kOne; power != 0; power >>= 1, b = times_x(b))
        if (a & power) sum ^= b;
    return sum;
}

// crc32 of parts end to end, from their crc32s: crc(A B) = crc(A) x^(8 |B|) + crc(B).
uint32_t joined_crc(uint32_t crc, const py::array_t<uint32_t, py::array::c_style>& crcs,
                    const py::array_t<int64_t, py::array::c_style>& sizes) {
    if (crcs.ndim() != 1 || sizes.ndim() != 1 || crcs.size() != sizes.size())
        throw py::value_error("crcs and sizes are vectors of one length");
    uint32_t squares[66];  // x^(2^k)
    squares[0] = kOne >> 1;
    for (int k = 1; k < 66; ++k) squares[k] = product(squares[k - 1], squares[k - 1]);
    for (py::ssize_t i = 0; i < crcs.size(); ++i) {
        uint64_t bytes = static_cast<uint64_t>(sizes.data()[i]);
        for (int k = 3; bytes != 0; bytes >>= 1, ++k)
            if (bytes & 1) crc = product(crc, squares[k]);
        crc ^= crcs.data()[i];
    }
    return crc;
}

}  // namespace

PYBIND11_MODULE(_records, module) {
    module.def("decode_records", &decode_records, py::arg("records"), py::kw_only(),
               py::arg("vocab_size"), py::arg("high_bits"), py::arg("has_logits"),
               "Planar records end to end: (document_offsets int64 [D + 1], positions int32 [P],\n"
               "offsets int64 [P + 1], uint16 [3 P], ids int32 [C], uint16 [C or 0]), where uint16\n"
               "are fp16 and logits as stored; or the number of the first record that breaks a\n"
               "rule of the format. Numbers are not looked at.");
    module.def("joined_crc", &joined_crc, py::arg("crc"), py::arg("crcs"), py::arg("sizes"),
               "crc32 of what has ``crc``, followed by parts of the given crc32s (uint32 [N]) and\n"
               "sizes in bytes (int64 [N]).");
}
