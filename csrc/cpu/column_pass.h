// The column pass: every expert adds to a chunk of columns of Y. See passes.h.
#pragma once

#include "passes.h"
#include "quantized_tile.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

constexpr int64_t kStreamedB = 384 << 10;     // packed panels that go by at once
constexpr int64_t kScratchBytes = 512 << 10;  // a thread's panels packed on the fly, in two halves

// One expert's contribution: n rows of A, K = k > 0, times the k rows of a [k, H] matrix (null if they are
// packed).
template <class T>
struct Section {
  const int32_t* tokens;  // [n]
  int64_t n;
  const AType<T>* a;  // [n, a_stride], or blocks (tile_block.h)
  int64_t a_stride;
  bool in_blocks;
  int64_t k;
  const T* matrix = nullptr;                  // [k, H]
  int64_t row_stride = 0, column_stride = 1;  // of matrix; if the latter is not 1, the former is
  const T* more = nullptr;                    // if set: the second half of these k rows
  const char* codes = nullptr;                // or the k rows as panels of codes
  QuantizedPanels code_panels = {};
};

// sums [T, stride] += rows of a panel's products, of which row r is token(r)'s.
template <class T, class F>
DSMOE_INLINE void add_rows(const CType<T> (*products)[kColumns<T>], int rows, F token,
                           CType<T>* sums, int64_t stride) {
  for (int r = 0; r < rows; ++r) {
    CType<T>* to = sums + token(r) * stride;
    for (int i = 0; i < kColumns<T>; i += kLanes<T>)
      store(to + i, load(to + i) + load(products[r] + i));
  }
}

// sums += all rows, in blocks, times the panel of args. Their sums lie anywhere, so they are multiplied apart and
// then added. sums: of the first token and of the panel's first column.
template <class T>
static void add_blocks(const Section<T>& s, CType<T>* sums, int64_t stride,
                       const TileArgs<T>& args) {
  for_each_block<1>(args, s.a, s.a_stride, s.n,
                    [&](int64_t first, int rows, const CType<T>(*block)[kColumns<T>]) {
                      const auto token = [&](int r) { return s.tokens[first + r]; };
                      add_rows<T>(block, rows, token, sums, stride);
                    });
}

// sums += rows of A from row `first` and element `term` on, times the B of args. sums: of the first
// token and of args' first column, a token's `stride` from the next one's.
template <class T>
static void add_tile(const Section<T>& s, int64_t first, int rows, int64_t term, CType<T>* sums,
                     int64_t stride, TileArgs<T>& args) {
  for (int r = 0; r < rows; ++r) {
    args.a[r] = s.a + (first + r) * s.a_stride + term;
    args.c[r] = sums + s.tokens[first + r] * stride;
  }
  run_tile<T, kRowPointers>(rows, args);
}

// The rows of A of the tile that begins at row `first`.
template <class T>
static Lines tile_rows(const Section<T>& s, int64_t first) {
  constexpr int64_t kBytes = sizeof(AType<T>);
  return {(const char*)(s.a + first * s.a_stride), min_of<int64_t>(s.n - first, kMaxRows),
          ceil_div(s.k * kBytes, 64), s.a_stride * kBytes};
}

// sums[t][0 .. (panel_end - panel_begin) * kColumns) += section, for these panels of the packed matrix.
template <class T>
static void add_packed(const Section<T>& s, const T* packed, int64_t hidden, int64_t panel_begin,
                       int64_t panel_end, CType<T>* sums) {
  const PackedPanels<T> b = PackedLayout<T>{hidden}.down(s.k);
  const int64_t panels = panel_end - panel_begin, stride = panels * kColumns<T>;
  TileArgs<T> args;
  args.accumulate = true;
  if (s.in_blocks) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      static_cast<PanelOfB<T>&>(args) = packed_panel(packed, b, panel_begin + panel);
      Ahead ahead = ahead_in_packed(packed, b, panel_begin + panel + 1);
      spread(ahead, s.n, 1, args, kBlockRows);
      add_blocks(s, sums + panel * kColumns<T>, stride, args);
    }
    return;
  }
  if (s.n <= kMaxRows) {  // block by block, each one stream
    args.panels = panels;
    for (int64_t block = 0; block < b.blocks(); ++block) {
      args.b = packed + b.start(block, panel_begin);
      args.steps = b.steps_of(block);
      add_tile(s, 0, int(s.n), b.first_term(block), sums, stride, args);
    }
    return;
  }
  // A few panels at a time stay in L2, and a tile's rows of A in L1, while the next tile's come into L2:
  // all rows of a large expert would not stay there beside the sums. Where they are one panel, all tiles
  // go by it while the next panel comes.
  args.steps = b.steps();
  const int64_t at_once = max_of<int64_t>(1, kStreamedB / (b.panel() * int64_t(sizeof(T))));
  for (int64_t begin = 0; begin < panels; begin += at_once) {
    const int64_t end = min_of(panels, begin + at_once);
    Ahead ahead = ahead_in_packed(packed, b, panel_begin + begin + 1);
    spread(ahead, s.n, 1, args);
    for_each_tile(s.n, [&](int64_t first, int rows) {
      if (at_once > 1) {
        ahead = {tile_rows(s, first + rows)};
        spread(ahead, rows, end - begin, args);
      }
      args.panels = b.blocks() == 1 ? end - begin : 1;
      for (int64_t panel = begin; panel < end; panel += args.panels) {
        static_cast<PanelOfB<T>&>(args) = packed_panel(packed, b, panel_begin + panel);
        add_tile(s, first, rows, 0, sums + panel * kColumns<T>, stride, args);
      }
    });
  }
}

// The same for a few rows times panels of codes.
template <class T>
static void add_codes(const Section<T>& s, const DigitRows<T>& a, int64_t panel_begin,
                      int64_t panel_end, CType<T>* sums) {
  constexpr int64_t kN = kColumns<T>;
  const int64_t stride = (panel_end - panel_begin) * kN;
  static constexpr int32_t kRows[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  static_assert(kFewRows <= 12);
  alignas(64) CType<T> products[kFewRows * kN];
  for (int64_t panel = panel_begin; panel < panel_end; ++panel, sums += kN) {
    multiply_codes<T>(s.codes + panel * s.code_panels.panel_bytes(), s.code_panels, a, kRows, s.n,
                      products, kN);
    for (int64_t r = 0; r < s.n; ++r) {
      CType<T>* to = sums + s.tokens[r] * stride;
      for (int i = 0; i < kN; i += kLanes<T>)
        store(to + i, load(to + i) + load(products + r * kN + i));
    }
  }
}

// Adds sections whose matrices are as they are, or codes. A few panels of an expert at a time are packed into one half of the
// scratch memory while those in the other half are multiplied, a slice after every tile, whose rows the
// tile has brought into L2. Packed all at once they came at 6 to 7 GB/s: what had been asked for during
// all the tiles before was no longer there (Zen 4).
template <class T>
class UnpackedColumns {
 public:
  UnpackedColumns(int64_t hidden, int64_t panel_begin, int64_t panel_end, CType<T>* sums,
                  T* scratch, int64_t scratch_size)
      : hidden_(hidden),
        begin_(panel_begin),
        end_(panel_end),
        sums_(sums),
        scratch_(scratch),
        half_(scratch_size / 2) {}

  void add(const Section<T>& s) {
    const int64_t panel_size = steps(s) * kColumns<T> * Compute<T>::kPair;
    const int64_t at_once = max_of<int64_t>(1, half_ / panel_size);
    for (int64_t panel = begin_; panel < end_; panel += at_once) {
      T* other = current_.b == scratch_ ? scratch_ + half_ : scratch_;
      multiply_and_pack({s, panel, min_of(at_once, end_ - panel), other});
    }
  }
  void finish() { multiply_and_pack({}); }

 private:
  struct Piece {
    Section<T> section = {};
    int64_t panel = 0, panels = 0;
    T* b = nullptr;
  };
  static int64_t steps(const Section<T>& s) { return ceil_div(s.k, Compute<T>::kPair); }

  // Multiplies the current piece while the next one is packed, which then is the current one.
  void multiply_and_pack(const Piece& next) {
    const Section<T>& s = current_.section;
    const int64_t next_steps = steps(next.section), stride = (end_ - begin_) * kColumns<T>;
    if (s.n == 0) pack(next, 0, next_steps);  // no tiles to pack it between
    TileArgs<T> args;
    args.b = current_.b;
    args.steps = steps(s);
    args.panels = current_.panels;
    args.accumulate = true;
    CType<T>* sums = sums_ + (current_.panel - begin_) * kColumns<T>;
    // Blocks of a transposition stay whole.
    const int64_t unit = next.section.column_stride == 1 ? 1 : kBlock;
    const auto step_at = [&](int64_t part, int64_t count) {
      return part == count ? next_steps : next_steps * part / count / unit * unit;
    };
    // Does a part of the multiplications, and packs as large a part of what is next.
    const auto interleave = [&](int64_t begin, int64_t end, int64_t count, int64_t rows,
                                int64_t panels, int64_t rows_at_once, auto multiply) {
      const int64_t from = step_at(begin, count), to = step_at(end, count);
      const int64_t half = next.section.more ? next_steps / 2 : next_steps;
      Ahead ahead = {lines(next, from, min_of(to, half)), lines(next, max_of(from, half), to)};
      spread(ahead, rows, panels, args, rows_at_once);
      multiply();
      pack(next, from, to);
    };
    if (s.in_blocks) {
      for (int64_t panel = 0; panel < current_.panels; ++panel)
        interleave(panel, panel + 1, current_.panels, s.n, 1, kBlockRows, [&] {
          args.b = current_.b + panel * args.steps * PackedPanels<T>::kStep;
          add_blocks(s, sums + panel * kColumns<T>, stride, args);
        });
    } else {
      for_each_tile(s.n, [&](int64_t first, int rows) {
        interleave(first, first + rows, s.n, rows, args.panels, kMaxRows, [&] {
          args.b = current_.b;
          add_tile(s, first, rows, 0, sums, stride, args);
        });
      });
    }
    current_ = next;
  }
  const T* row(const Section<T>& s, int64_t i) const {
    return s.more && i >= s.k / 2 ? s.more + (i - s.k / 2) * s.row_stride
                                  : s.matrix + i * s.row_stride;
  }
  void pack(const Piece& p, int64_t step_begin, int64_t step_end) const {
    const Section<T>& s = p.section;
    if constexpr (kHasCodes<T>) {
      if (s.codes) {
        for (int64_t i = 0; i < p.panels; ++i)
          dequantize(s.codes + (p.panel + i) * s.code_panels.panel_bytes(), s.code_panels,
                     code_block(s, step_begin), code_block(s, step_end),
                     p.b + i * steps(s) * kColumns<T> * Compute<T>::kPair);
        return;
      }
    }
    if (s.column_stride != 1)
      return pack_rows_of_panels(s.matrix, s.column_stride, s.k, step_begin, step_end,
                                 p.panel * kColumns<T>, hidden_, p.panels, p.b);
    pack_columns([&](int64_t i) { return row(s, i); }, s.k, step_begin, step_end,
                 p.panel * kColumns<T>, hidden_, p.panels, p.b);
  }
  // Blocks of codes that begin before a step.
  static int64_t code_block(const Section<T>& s, int64_t step) {
    return ceil_div(step * Compute<T>::kPair, s.code_panels.block_terms());
  }
  // The rows of these steps, all of one matrix, or their part of its columns.
  Lines lines(const Piece& p, int64_t step_begin, int64_t step_end) const {
    const Section<T>& s = p.section;
    if (step_begin >= step_end) return {};
    if (s.codes) {
      const QuantizedPanels& b = s.code_panels;
      const int64_t first = code_block(s, step_begin), last = code_block(s, step_end);
      return {s.codes + p.panel * b.panel_bytes() + b.block_start(first), p.panels,
              (b.block_start(last) - b.block_start(first)) / 64, b.panel_bytes()};
    }
    const int64_t begin = step_begin * Compute<T>::kPair;
    const int64_t rows = min_of(step_end * Compute<T>::kPair, s.k) - begin;
    if (rows <= 0) return {};
    const int64_t column = p.panel * kColumns<T>, columns = p.panels * kColumns<T>;
    constexpr int64_t kBytes = sizeof(T);
    if (s.column_stride != 1)
      return {(const char*)(s.matrix + column * s.column_stride + begin),
              min_of(columns, hidden_ - column), ceil_div(rows * kBytes, 64),
              s.column_stride * kBytes};
    return {(const char*)(row(s, begin) + column), rows, ceil_div(columns * kBytes, 64),
            s.row_stride * kBytes};
  }

  int64_t hidden_, begin_, end_;
  CType<T>* sums_;
  T* scratch_;
  int64_t half_;
  Piece current_ = {};
};

// Rounds sums, times the scales [H padded] of columns if there are any, to rows of out [T, H].
template <class T>
static void write_columns(const CType<T>* sums, int64_t num_tokens, int64_t hidden,
                          int64_t panel_begin, int64_t panel_end, T* out,
                          const CType<T>* scales = nullptr) {
  const int64_t stride = (panel_end - panel_begin) * kColumns<T>,
                column = panel_begin * kColumns<T>;
  const int64_t width = min_of(stride, hidden - column);
  if (scales) scales += column;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const CType<T>* from = sums + t * stride;
    T* to = out + t * hidden + column;
    int64_t i = 0;
    for (; i + kLanes<T> <= width; i += kLanes<T>)
      store(to + i, scales ? load(from + i) * load(scales + i) : load(from + i));
    for (; i < width; ++i) narrow(scales ? from[i] * scales[i] : from[i], to[i]);
  }
}

// How many chunks to cut the columns into: the sums of all tokens stay in half of L2, and threads
// find several to draw that come out even (18 panels for two threads: six chunks, not eight). A few tokens
// wait for the weights alone, which come faster in long runs: as few chunks as come out even (two).
template <class T>
static int64_t column_chunks(int64_t num_tokens, int64_t hidden, int threads) {
  const int64_t panels = ceil_div(hidden, kColumns<T>);
  const int64_t bytes = num_tokens * panels * kColumns<T> * int64_t(sizeof(CType<T>));
  const int64_t least = min_of(panels, max_of<int64_t>(ceil_div(bytes, kL2Budget), threads));
  if (threads == 1) return least;
  int64_t best = least, best_share = panels;
  for (int64_t chunks = least; chunks <= min_of(panels, max_of<int64_t>(least, 4 * threads));
       ++chunks) {
    const int64_t share = ceil_div(chunks, threads) * ceil_div(panels, chunks);  // of the busiest
    const bool is_better = num_tokens <= kMaxRows ? share < best_share : share <= best_share;
    if (is_better) best = chunks, best_share = share;
  }
  return best;
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE
