// The kernels of csrc/cuda on the host: the same blocks, warps and sums, one after another.
#include <cstring>
#include <vector>

#include "cuda/plan.hpp"
#include "po_kernels/gaussian.hpp"
#include "po_kernels/mvn.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

class OnHost {
 public:
  explicit OnHost(const CudaLaunch& launch) : order_(launch.backward ? Order::backward : Order::forward) {}

  template <class Rows>
  void rows(const Work<typename Rows::Call>& work, size_t bytes) {
    std::vector<double> storage(bytes / sizeof(double) + 2);  // of the alignment of shared memory
    char* memory = reinterpret_cast<char*>(storage.data());
    for (int64_t block = 0; block < work.launch.blocks; ++block) {
      std::memset(memory, 0xff, bytes);  // NaN
      Memory shared{memory, work.of_block};
      const Rows rows(work, shared);
      rows.load_shared(Block{order_});
      char* warps = memory + work.shared_bytes;
      for (int warp = 0; warp < work.warps; ++warp) {
        Memory own{warps + warp * work.warp_bytes, work.of_warp};
        const typename Rows::Warps held(rows, own);
        rows.rows(Warp{order_}, held, block * work.warps + warp);
      }
      if constexpr (Rows::is_loss) {
        const int64_t terms = Rows::summed(work.call), stored = Rows::stored(work.call);
        store_sums(Block{order_}, warps, work.warp_bytes, work.warps, terms, stored,
                   work.launch.partials + block * (kHead + stored));
      }
    }
  }

  template <class T>
  void finish(const Finish& finish) {
    double scratch[kLanes * Finish::kParts];
    for (int64_t number = 0; number < finish.groups(); ++number) finish.group<T>(Block{order_}, number, scratch);
  }

  std::string error() const { return {}; }

 private:
  Order order_;
};

}  // namespace PK_LEVEL

#define PK_DEFINE_OF(Scale, name, type)                                     \
  CudaOutcome emulated_##name(const type& call, const CudaLaunch& launch) { \
    return run_gaussian<Scale>(call, launch, OnHost(launch));               \
  }
#define PK_DEFINE_DIAGONAL(name, type) PK_DEFINE_OF(DiagonalScale, name, type)
#define PK_DEFINE_TRIANGULAR(name, type) PK_DEFINE_OF(TriangularScale, name, type)
PK_GAUSSIAN_KERNELS(PK_DEFINE_DIAGONAL, PK_NO_KERNEL, gaussian)
PK_GAUSSIAN_KERNELS(PK_DEFINE_TRIANGULAR, PK_NO_KERNEL, mvn)

}  // namespace po_kernels
