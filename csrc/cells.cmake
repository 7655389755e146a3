# add_cell_instances(TARGET SOURCE LIBRARIES): SOURCE compiled once for each line of cells.def, as object libraries
# <TARGET>_<cell>. LIBRARIES gets their names.
set(cells_def ${CMAKE_CURRENT_LIST_DIR}/cells.def)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${cells_def})

function(add_cell_instances target source libraries)
  file(STRINGS ${cells_def} lines REGEX "^CELL\\(")
  set(found "")
  foreach(line IN LISTS lines)
    if(NOT line MATCHES "^CELL\\(([a-z0-9_]+), ([a-z0-9_]+\\.h), ([A-Za-z0-9]+)\\)$")
      message(FATAL_ERROR "cells.def has a line that is not CELL(name, header, functor): ${line}")
    endif()
    set(library ${target}_${CMAKE_MATCH_1})
    add_library(${library} OBJECT ${source})
    target_compile_definitions(${library} PRIVATE FASTSEQ_CELL_NAME=${CMAKE_MATCH_1}
      FASTSEQ_CELL_HEADER="math/${CMAKE_MATCH_2}" FASTSEQ_CELL_FUNCTOR=${CMAKE_MATCH_3})
    list(APPEND found ${library})
  endforeach()
  set(${libraries} ${found} PARENT_SCOPE)
endfunction()
