// Where rows of activations lie for kernels that read them in tiles (GemmKernel::in_tiles).
//
// The rows that are multiplied together are cut into groups of 96, and a group into as few tiles of
// up to 16 rows as there can be, of equal size: 33 rows are 3 tiles of 11, so none of them is
// multiplied for little. The last one may have room for rows that there are not; what lies there is
// multiplied, too, and written nowhere.
#pragma once

#include <cstdint>

namespace qmoe_plugin::cpu {

inline constexpr int kTileRows = 16, kGroupTiles = 6, kGroupRows = kTileRows * kGroupTiles;

/// How a group of `rows` rows, 1 to kGroupRows, is cut.
struct RowTiles {
  int rows, tiles, tile_rows;
};
[[gnu::always_inline]] constexpr RowTiles CutGroup(int rows) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  return {rows, tiles, (rows + tiles - 1) / tiles};
}

/// Row `row` of the `rows` that are stored together at `tile`; by itself, where there are no tiles.
struct StoredRow {
  void* tile;
  int row = 0, rows = 1;
};

/// Bytes of tiles along the whole of K.
struct TileSize {
  int64_t of_row, of_tile;  // for each row of a tile, and besides
  [[gnu::always_inline]] constexpr int64_t Bytes(int64_t tile_rows) const {
    return tile_rows * of_row + of_tile;
  }
  /// Of `rows` rows that are multiplied together.
  [[gnu::always_inline]] constexpr int64_t StoredBytes(int64_t rows) const {
    const int64_t whole = rows / kGroupRows * kGroupTiles * Bytes(kTileRows);
    if (rows % kGroupRows == 0) return whole;
    const RowTiles rest = CutGroup(int(rows % kGroupRows));
    return whole + rest.tiles * Bytes(rest.tile_rows);
  }
  /// Row `row` of them, from `x` on.
  [[gnu::always_inline]] constexpr StoredRow RowAt(uint8_t* x, int64_t rows, int64_t row) const {
    const int64_t first = row / kGroupRows * kGroupRows, rest = rows - first;
    const RowTiles group = CutGroup(int(rest < kGroupRows ? rest : kGroupRows));
    const int in_group = int(row - first), tile = in_group / group.tile_rows;
    return {x + StoredBytes(first) + tile * Bytes(group.tile_rows), in_group % group.tile_rows,
            group.tile_rows};
  }
};

}  // namespace qmoe_plugin::cpu
