// Where route and permute put rows, on the emulated GPU: against a stable sort.
#include "ops/qmoe/permute.cuh"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "tests/cpp/expect.h"

using namespace qmoe_plugin;

namespace {

std::mt19937 rng(7);

struct Case {
  int tokens, experts, topk;
  int columns = 0;    // of 2 bytes; 0 = x is not copied
  int misplaced = 0;  // x begins so many values after an aligned address
};

/// Different experts for each token; the first ones get the most tokens, some none.
std::vector<int> Choose(const Case& c) {
  std::vector<int> ids, candidates(c.experts);
  std::iota(candidates.begin(), candidates.end(), 0);
  for (int token = 0; token < c.tokens; ++token) {
    const int among = std::max(c.topk, token % 4 == 0 ? c.experts * 3 / 4 : c.experts / 4);
    for (int j = 0; j < c.topk; ++j)
      std::swap(candidates[j], candidates[j + int(rng() % unsigned(among - j))]);
    ids.insert(ids.end(), candidates.begin(), candidates.begin() + c.topk);
    std::sort(candidates.begin(), candidates.end());
  }
  return ids;
}

/// What route says of slices whose tokens go to these experts.
std::vector<int> CountSlices(const Case& c, const std::vector<int>& ids) {
  std::vector<int> counts(size_t(Slices(c.tokens)) * c.experts);
  for (size_t row = 0; row < ids.size(); ++row)
    ++counts[row / c.topk / SliceTokens(c.tokens) * c.experts + ids[row]];
  return counts;
}

/// A list of row tiles, full of nonsense.
struct Tiles {
  Tiles(int tile_rows, const Case& c)
      : tile_rows(tile_rows),
        tiles(MaxRowTiles(int64_t(c.tokens) * c.topk, c.experts, tile_rows), {-1, -1, -1}) {}
  RowTileList list() { return {tile_rows, tiles.data(), &count, &next_item}; }

  int tile_rows;
  std::vector<RowTile> tiles;
  int count = -1, next_item = -1;
};

/// All rows, in order, in tiles of one expert and of almost equal size.
void CheckTiles(const Tiles& list, const std::vector<int>& offsets) {
  EXPECT(list.next_item == 0, "the next item is ", list.next_item);
  int tile = 0;
  for (int expert = 0; expert + 1 < int(offsets.size()); ++expert) {
    const int rows = offsets[expert + 1] - offsets[expert];
    const int expected = (rows + list.tile_rows - 1) / list.tile_rows;
    int row = offsets[expert], tiles = 0, most = 0, least = rows;
    for (; tile < list.count && list.tiles[tile].expert == expert; ++tile, ++tiles) {
      const RowTile& t = list.tiles[tile];
      EXPECT(t.row_begin == row && t.row_count > 0 && t.row_count <= list.tile_rows, "tile ", tile,
             " has ", t.row_count, " rows from ", t.row_begin, " on");
      row += t.row_count;
      most = std::max(most, t.row_count), least = std::min(least, t.row_count);
    }
    EXPECT(row == offsets[expert + 1] && tiles == expected, "expert ", expert, " has ", tiles,
           " tiles up to row ", row);
    EXPECT(most - least < 8 * std::max(tiles, 1), "tiles of ", least, " to ", most, " rows");
  }
  EXPECT(tile == list.count, list.count, " tiles; ", tile, " are of experts");
}

void TestPermute(const Case& c) {
  const int rows = c.tokens * c.topk;
  const std::vector<int> ids = Choose(c), counts = CountSlices(c, ids);
  std::vector<int> offsets(c.experts + 1, -1), row_token(rows, -1), sorted_row(rows, -1);
  Tiles fc1(32, c), fc2(10, c);
  std::vector<uint16_t> x(size_t(c.tokens) * c.columns + 8), sorted(size_t(rows) * c.columns + 8);
  for (uint16_t& value : x) value = uint16_t(rng());
  const uint16_t* const first = x.data() + c.misplaced;
  LaunchPermute({.expert_ids = ids.data(),
                 .slice_counts = counts.data(),
                 .tokens = c.tokens,
                 .experts = c.experts,
                 .topk = c.topk,
                 .expert_offsets = offsets.data(),
                 .row_token = row_token.data(),
                 .sorted_row = sorted_row.data(),
                 .fc1 = fc1.list(),
                 .fc2 = fc2.list(),
                 .x = first,
                 .sorted = c.columns > 0 ? sorted.data() : nullptr,
                 .row_bytes = std::max(c.columns, 1) * 2,
                 .overlap = Overlap::kPrevious},
                nullptr);

  std::vector<int> order(rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return ids[a] < ids[b]; });
  std::vector<int> begins(c.experts + 1);
  for (int id : ids) ++begins[id + 1];
  std::partial_sum(begins.begin(), begins.end(), begins.begin());
  EXPECT(offsets == begins, "offsets of experts");
  for (int place = 0; place < rows; ++place) {
    const int row = order[place], token = row / c.topk;
    EXPECT(sorted_row[row] == place, "row ", row, " is at ", sorted_row[row], ", not ", place);
    EXPECT(row_token[place] == token, "token of ", place, " is ", row_token[place]);
    const auto from = first + size_t(token) * c.columns;
    EXPECT(std::equal(from, from + c.columns, sorted.data() + size_t(place) * c.columns),
           "values of row ", row);
  }
  CheckTiles(fc1, begins);
  CheckTiles(fc2, begins);
}

/// The experts of a token have the largest logits, and are counted.
void TestRoute(const Case& c, int shared) {
  const std::vector<int> routed = Choose({c.tokens, c.experts - shared, c.topk - shared});
  std::vector<float> logits(size_t(c.tokens) * c.experts, -1), scales(size_t(c.tokens) * c.topk);
  std::vector<int> expected;
  for (int token = 0; token < c.tokens; ++token) {
    for (int j = 0; j < c.topk - shared; ++j) {
      expected.push_back(routed[token * (c.topk - shared) + j]);
      logits[size_t(token) * c.experts + expected.back()] = float(c.topk - j);
    }
    for (int j = 0; j < shared; ++j) expected.push_back(c.experts - shared + j);
  }
  std::vector<int> ids(expected.size(), -1);
  std::vector<int> counts(size_t(Slices(c.tokens)) * c.experts, -1);
  RouteArgs args{};
  args.logits = logits.data(), args.logits_dtype = DType::kFloat32;
  args.tokens = c.tokens, args.experts = c.experts, args.topk = c.topk, args.shared = shared;
  args.expert_ids = ids.data(), args.scales = scales.data();
  LaunchRoute(args, counts.data(), nullptr);
  EXPECT(ids == expected, "experts of ", c.tokens, " tokens");
  EXPECT(counts == CountSlices(c, expected), "counts of ", c.tokens, " tokens in slices");
}

}  // namespace

int main() {
  TestPermute({1, 1, 1});
  TestPermute({1, 1024, 1024});
  TestPermute({9, 8, 3, 40});
  TestPermute({128, 33, 4, 8, 3});  // x is not aligned
  TestPermute({129, 32, 4, 12});    // rows of x are not
  TestPermute({200, 300, 7});
  TestPermute({520, 60, 6, 16});
  TestPermute(
      {129, 530, 520});  // slices of 2 tokens, of which a block's threads take one at a time
  TestPermute({9000, 5, 2, 24});  // slices of 71 tokens, in rounds of 32
  TestRoute({1, 5, 3}, 0);
  TestRoute({300, 40, 4}, 2);
  TestRoute({2100, 260, 2}, 1);  // slices of 17 tokens, for 16 warps
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
